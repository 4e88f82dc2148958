//! The largest singular values of a large matrix, by randomized subspace iteration.
//!
//! N. Halko, P. Martinsson, J. Tropp, "Finding structure with randomness", 2011. Starting from random vectors, each iteration multiplies
//! an orthonormal block `Q`, `n×b`, by `M·Mᵀ`, which rotates it towards the leading singular vectors:
//!
//! ```text
//! Z = Mᵀ·Q = P·R        M·Mᵀ·Q ≈ M·P → Q        M ≈ Q·Zᵀ = Q·Rᵀ·Pᵀ
//! ```
//!
//! Products and decompositions are faer's. The random numbers have a fixed seed, so equal matrices give equal bits.

use faer::Mat;
use faer::linalg::solvers::Qr;

use super::decompose::{Keep, Svd};
use crate::error::Result;
use crate::random::Rng;

/// Oversampling: columns of the block beyond the rank.
const OVERSAMPLING: usize = 16;
/// The largest number of iterations.
const MAX_ITERATIONS: usize = 24;
/// The iteration ends when the energy that it has found (the sum of squared singular values) grows by at most this fraction of the
/// whole. The error is then within `3·10⁻⁷·‖M‖` of the smallest possible one: five times the unit roundoff of `f32`.
const TOLERANCE: f64 = 1e-13;

/// The singular values that `keep` selects, and perhaps a few more. `None` if a full decomposition would be faster: for a small
/// matrix, for a large part of its singular values, and for values that are too close to one another.
pub(super) fn leading(matrix: &Mat<f64>, energy: f64, keep: Keep) -> Result<Option<Svd>> {
    let side = matrix.nrows().min(matrix.ncols());
    let mut rank = match keep {
        Keep::Rank(rank) => rank,
        Keep::Energy(_) => OVERSAMPLING,
    };
    while rank.saturating_add(OVERSAMPLING).saturating_mul(4) <= side {
        let Some(svd) = iterate(matrix, rank, energy)? else { return Ok(None) };
        if svd.rank(keep)? <= rank {
            return Ok(Some(svd));
        }
        rank *= 2;
    }
    Ok(None)
}

/// The first `rank` singular values, or `None` if the iteration does not converge.
fn iterate(matrix: &Mat<f64>, rank: usize, energy: f64) -> Result<Option<Svd>> {
    let mut rng = Rng::new(0);
    let random = Mat::from_fn(matrix.ncols(), rank + OVERSAMPLING, |_, _| rng.gaussian());
    let mut q = basis(&(matrix * random));
    let mut before = 0.0;
    for _ in 0..MAX_ITERATIONS {
        let z = Qr::new((matrix.transpose() * &q).as_ref());
        let core = Svd::decompose(&z.thin_R().transpose().to_owned())?;
        let found: f64 = core.singular_values().iter().take(rank).map(|s| s * s).sum();
        let p = z.compute_thin_Q();
        if found - before <= TOLERANCE * energy {
            return Ok(Some(core.within(&q, &p, energy).truncated(rank)));
        }
        before = found;
        q = basis(&(matrix * p));
    }
    Ok(None)
}

/// Orthonormal columns whose span contains the columns of a matrix.
fn basis(matrix: &Mat<f64>) -> Mat<f64> {
    Qr::new(matrix.as_ref()).compute_thin_Q()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A matrix with these singular values and random singular vectors.
    fn with_values(n: usize, k: usize, value: impl Fn(usize) -> f64) -> Mat<f64> {
        let mut rng = Rng::new(3);
        let q = n.min(k);
        let u = basis(&Mat::from_fn(n, q, |_, _| rng.gaussian()));
        let v = basis(&Mat::from_fn(k, q, |_, _| rng.gaussian()));
        u * Mat::from_fn(q, q, |i, j| if i == j { value(i) } else { 0.0 }) * v.transpose()
    }

    fn energy(matrix: &Mat<f64>) -> f64 {
        (0..matrix.ncols()).flat_map(|j| (0..matrix.nrows()).map(move |i| matrix[(i, j)].powi(2))).sum()
    }

    /// Spectra of low rank with noise, of exactly low rank, of rank 1, of exponential decay, and of the zero matrix.
    #[test]
    fn the_first_singular_values_are_those_of_the_whole_decomposition() {
        let spectra: [fn(usize) -> f64; 5] = [
            |i| if i < 6 { 3.0 - 0.4 * i as f64 } else { 1e-3 },
            |i| if i < 6 { 1.0 } else { 0.0 },
            |i| if i < 1 { 5.0 } else { 0.0 },
            |i| 0.8f64.powi(i as i32),
            |_| 0.0,
        ];
        for (n, k) in [(120, 100), (90, 150)] {
            for (at, value) in spectra.iter().enumerate() {
                let matrix = with_values(n, k, value);
                let svd = leading(&matrix, energy(&matrix), Keep::Rank(6)).unwrap().unwrap();
                let whole = Svd::decompose(&matrix).unwrap();
                for (got, want) in svd.singular_values().iter().zip(whole.singular_values()).take(6) {
                    // Each is too small by at most the square root of the energy that another iteration may add.
                    assert!((got - want).abs() <= 1e-6 * whole.singular_values()[0], "{at}, {n}×{k}: {got} {want}");
                }
                let [got, want] = [&svd, &whole].map(|svd| {
                    let (a, b) = svd.factors(6);
                    let product = |i: usize, j: usize| -> f64 {
                        (0..6).map(|q| f64::from(b.values()[i * 6 + q]) * f64::from(a.values()[q * k + j])).sum()
                    };
                    energy(&Mat::from_fn(n, k, |i, j| matrix[(i, j)] - product(i, j))).sqrt()
                });
                assert!(got - want <= 1e-6 * energy(&matrix).sqrt(), "{at}, {n}×{k}: loses {got}, least is {want}");
            }
        }
    }

    #[test]
    fn energy_finds_the_rank_that_the_whole_decomposition_finds() {
        let matrix = with_values(300, 260, |i| 0.9f64.powi(i as i32));
        let whole = Svd::decompose(&matrix).unwrap();
        for share in [0.5, 0.9, 0.99] {
            let svd = leading(&matrix, energy(&matrix), Keep::Energy(share)).unwrap().unwrap();
            assert_eq!(svd.rank(Keep::Energy(share)).unwrap(), whole.rank(Keep::Energy(share)).unwrap(), "{share}");
        }
    }

    #[test]
    fn a_full_decomposition_is_left_to_where_it_is_faster() {
        let flat = with_values(100, 100, |i| 1.0 - 1e-4 * i as f64);
        assert!(leading(&flat, energy(&flat), Keep::Rank(4)).unwrap().is_none(), "close singular values");
        let steep = with_values(100, 100, |i| 0.5f64.powi(i as i32));
        assert!(leading(&steep, energy(&steep), Keep::Rank(10)).unwrap().is_none(), "a large part of a small matrix");
        assert!(leading(&steep, energy(&steep), Keep::Rank(usize::MAX)).unwrap().is_none());
    }
}
