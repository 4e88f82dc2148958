//! `M = U·diag(s)·V` and `M = Q·R`: the decompositions for compressing, extracting, and the initialisations `pissa` and `olora`.
//!
//! All arithmetic is in `f64` on one thread, so equal matrices give equal bits. The decompositions are faer's.

use faer::Mat;
use faer::linalg::solvers::{Qr, Svd as FaerSvd};

use super::matrix::HostMatrix;
use super::randomized_svd::leading;
use crate::error::{Error, Result};

/// The number of singular values that an approximation keeps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Keep {
    /// This many, or all if there are fewer.
    Rank(usize),
    /// The fewest whose squares sum to at least this fraction of the sum of all squares: above 0, at most 1.
    Energy(f64),
}

impl Keep {
    /// Errors: [`Error::Value`] for rank 0, and for an energy outside its range.
    pub(super) fn check(self, verb: &'static str) -> Result<()> {
        match self {
            Keep::Rank(rank) => Error::unless(rank > 0, verb, "rank", rank, "at least 1"),
            Keep::Energy(share) => Error::unless(share > 0.0 && share <= 1.0, verb, "energy", share, "above 0 and at most 1"),
        }
    }
}

/// A singular value decomposition `M = U·diag(s)·V`: U `n×q` and V `q×k` are orthonormal, and s is descending. q is the smaller of n and
/// k, or less for a product and for a [leading](Self::leading) part.
#[derive(Clone, Debug)]
pub struct Svd {
    u: Mat<f64>,
    s: Vec<f64>,
    /// V transposed, as faer stores it: `k×q`.
    v: Mat<f64>,
    /// The sum of the squares of all singular values, including those that are not in `s`.
    energy: f64,
}

impl Svd {
    /// The full decomposition of a matrix. Errors: [`Error::Value`] if an element is infinite or NaN, or the SVD does not converge.
    pub fn of(matrix: &HostMatrix) -> Result<Self> {
        finite("svd", "matrix", matrix)?;
        Self::decompose(&wide(matrix))
    }

    /// The decomposition of a matrix as far as `keep` needs it. If few singular values of a large matrix are needed, a randomized SVD
    /// finds only those, which is faster; the error of the approximation is then within `3·10⁻⁷·‖M‖` of the smallest possible one.
    /// Errors: those of [`of`](Self::of) and [`rank`](Self::rank).
    pub fn leading(matrix: &HostMatrix, keep: Keep) -> Result<Self> {
        keep.check("svd")?;
        finite("svd", "matrix", matrix)?;
        let energy = matrix.values().iter().map(|&value| f64::from(value).powi(2)).sum();
        let matrix = wide(matrix);
        leading(&matrix, energy, keep)?.map_or_else(|| Self::decompose(&matrix), Ok)
    }

    /// The decomposition of `scale·B·A`, without computing the product: QR of both factors, then SVD of an `r×r` core.
    ///
    /// Errors: [`Error::Shape`] unless A has as many rows as B has columns; those of [`of`](Self::of).
    pub fn of_product(b: &HostMatrix, a: &HostMatrix, scale: f64) -> Result<Self> {
        finite("svd", "b", b)?;
        finite("svd", "a", a)?;
        if b.cols() != a.rows() {
            let want = (b.cols(), a.cols()).into();
            return Err(Error::Shape { verb: "svd", name: "a", got: a.shape(), want });
        }
        let (left, right) = (Qr::new(wide(b).as_ref()), Qr::new(wide(a).transpose()));
        let core = left.thin_R() * right.thin_R().transpose() * faer::Scale(scale);
        let core = Self::decompose(&core)?;
        let energy = core.energy;
        Ok(core.within(&left.compute_thin_Q(), &right.compute_thin_Q(), energy))
    }

    /// The decomposition of `Q·M·Pᵀ` from that of M, where Q and P have orthonormal columns. `energy` is that of the whole matrix.
    pub(super) fn within(self, q: &Mat<f64>, p: &Mat<f64>, energy: f64) -> Self {
        Self { u: q * self.u, s: self.s, v: p * self.v, energy }
    }

    /// Only the first singular values.
    pub(super) fn truncated(mut self, rank: usize) -> Self {
        self.s.truncate(rank);
        self
    }

    pub(super) fn decompose(matrix: &Mat<f64>) -> Result<Self> {
        let not_converged = |_| Error::Value {
            verb: "svd",
            name: "matrix",
            got: "one whose SVD did not converge".into(),
            want: "another".into(),
        };
        let svd = FaerSvd::new_thin(matrix.as_ref()).map_err(not_converged)?;
        let s: Vec<f64> = svd.S().column_vector().iter().copied().collect();
        let energy = s.iter().map(|s| s * s).sum();
        Ok(Self { u: svd.U().to_owned(), s, v: svd.V().to_owned(), energy })
    }

    /// The singular values, in descending order.
    pub fn singular_values(&self) -> &[f64] {
        &self.s
    }

    /// The number of singular values that `keep` selects; at least 1 if there is one. If this is a leading part whose values do not
    /// reach the fraction of [`Keep::Energy`], it is one more than their number. Errors: [`Error::Value`] for a `keep` out of range.
    pub fn rank(&self, keep: Keep) -> Result<usize> {
        keep.check("svd")?;
        let share = match keep {
            Keep::Rank(rank) => return Ok(rank.min(self.s.len())),
            Keep::Energy(share) => share,
        };
        let enough = share * self.energy;
        let energies = self.s.iter().scan(0.0, |sum, s| {
            *sum += s * s;
            Some(*sum)
        });
        let below = energies.take_while(|&sum| sum < enough).count();
        Ok((below + 1).min(self.s.len() + usize::from(self.is_part())))
    }

    /// True if there are singular values that are not in `s`.
    fn is_part(&self) -> bool {
        self.s.len() < self.u.ncols()
    }

    /// The factors `A = V` and `B = U·diag(s)` of the best approximation of this rank, or of all singular values if there are fewer.
    pub fn factors(&self, rank: usize) -> (HostMatrix, HostMatrix) {
        let rank = rank.min(self.s.len());
        self.split(rank, |_| 1.0, |s| s)
    }

    /// `A = diag(in_a(s))·V`, `B = U·diag(in_b(s))`
    fn split(&self, rank: usize, in_a: impl Fn(f64) -> f64, in_b: impl Fn(f64) -> f64) -> (HostMatrix, HostMatrix) {
        let a = HostMatrix::from_fn(rank, self.v.nrows(), |q, j| in_a(self.s[q]) * self.v[(j, q)]);
        let b = HostMatrix::from_fn(self.u.nrows(), rank, |i, q| self.u[(i, q)] * in_b(self.s[q]));
        (a, b)
    }
}

/// `A` and `B` with `scaling·B·A ≈ W`: the principal part of a weight, which the initialisation `pissa` subtracts from W.
///
/// `A = diag(√(s/scaling))·V`, `B = U·diag(√(s/scaling))`. Errors: [`Error::Value`] for a rank above the sides of W, a
/// scaling that is not above 0, or a weight that is not finite.
pub fn pissa(w: &HostMatrix, rank: usize, scaling: f64) -> Result<(HostMatrix, HostMatrix)> {
    within("pissa", w, rank)?;
    Error::unless(scaling > 0.0 && scaling.is_finite(), "pissa", "scaling", scaling, "a finite number above 0")?;
    let root = |s: f64| (s / scaling).sqrt();
    Ok(Svd::of(w)?.split(rank, root, root))
}

/// `B = Q[:, ..rank]` and `A = R[..rank]` of `W = Q·R`; the initialisation `olora` subtracts `scaling·B·A` from W.
///
/// Errors: [`Error::Value`] for a rank above the sides of W, or a weight that is not finite.
pub fn olora(w: &HostMatrix, rank: usize) -> Result<(HostMatrix, HostMatrix)> {
    within("olora", w, rank)?;
    finite("olora", "w", w)?;
    let qr = Qr::new(wide(w).as_ref());
    let (q, r) = (qr.compute_thin_Q(), qr.thin_R());
    Ok((HostMatrix::from_fn(rank, w.cols(), |i, j| r[(i, j)]), HostMatrix::from_fn(w.rows(), rank, |i, j| q[(i, j)])))
}

fn within(verb: &'static str, w: &HostMatrix, rank: usize) -> Result<()> {
    let max = w.rows().min(w.cols());
    Error::unless((1..=max).contains(&rank), verb, "rank", rank, "at least 1, and at most the smaller dimension of the weight")
}

fn finite(verb: &'static str, name: &'static str, matrix: &HostMatrix) -> Result<()> {
    let bad = matrix.values().iter().find(|value| !value.is_finite());
    bad.map_or(Ok(()), |value| Error::unless(false, verb, name, value, "finite numbers"))
}

fn wide(matrix: &HostMatrix) -> Mat<f64> {
    let (cols, values) = (matrix.cols(), matrix.values());
    Mat::from_fn(matrix.rows(), cols, |i, j| f64::from(values[i * cols + j]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Rng;

    fn random(rows: usize, cols: usize, seed: u64) -> HostMatrix {
        let mut rng = Rng::new(seed);
        HostMatrix::new((rows, cols), (0..rows * cols).map(|_| rng.gaussian() as f32).collect()).unwrap()
    }

    /// `scale·B·A`, as three plain loops.
    fn product(b: &HostMatrix, a: &HostMatrix, scale: f64) -> Vec<f64> {
        let (n, r, k) = (b.rows(), b.cols(), a.cols());
        let term = |i: usize, j: usize, q: usize| f64::from(b.values()[i * r + q]) * f64::from(a.values()[q * k + j]);
        (0..n * k).map(|at| scale * (0..r).map(|q| term(at / k, at % k, q)).sum::<f64>()).collect()
    }

    fn norm(values: impl IntoIterator<Item = f64>) -> f64 {
        values.into_iter().map(|value| value * value).sum::<f64>().sqrt()
    }

    fn distance(left: &[f64], right: &[f64]) -> f64 {
        norm(left.iter().zip(right).map(|(left, right)| left - right))
    }

    fn values(matrix: &HostMatrix) -> Vec<f64> {
        matrix.values().iter().copied().map(f64::from).collect()
    }

    /// A bound on the error from rounding the two factors to `f32`: one unit roundoff for each, in a product of `rank` terms.
    fn rounding(svd: &Svd) -> f64 {
        2.0 * norm(svd.s.iter().copied()) * (svd.s.len() as f64).sqrt() / (1u64 << 23) as f64
    }

    /// Eckart and Young: the error of the best approximation is the tail of the singular values.
    #[test]
    fn the_error_is_the_tail_of_the_singular_values() {
        for (n, k) in [(1, 1), (7, 4), (4, 7), (12, 12), (1, 9), (9, 1)] {
            let matrix = random(n, k, 1);
            let svd = Svd::of(&matrix).unwrap();
            for rank in 1..=n.min(k) {
                let (a, b) = svd.factors(rank);
                assert_eq!((a.rows(), b.cols()), (rank, rank));
                let lost = distance(&product(&b, &a, 1.0), &values(&matrix));
                let tail = norm(svd.singular_values()[rank..].iter().copied());
                assert!((lost - tail).abs() <= rounding(&svd), "{n}×{k} rank {rank}: lost {lost}, tail {tail}");
            }
        }
    }

    #[test]
    fn the_factored_form_has_the_singular_values_of_the_product() {
        for (n, k, r) in [(9, 8, 3), (3, 8, 5), (8, 3, 5), (4, 4, 9), (5, 6, 1)] {
            let (b, a, scale) = (random(n, r, 2), random(r, k, 3), -0.75);
            let factored = Svd::of_product(&b, &a, scale).unwrap();
            let dense = Mat::from_fn(n, k, |i, j| product(&b, &a, scale)[i * k + j]);
            let dense = Svd::decompose(&dense).unwrap();
            let bound = 1e2 * f64::EPSILON * dense.s[0];
            for (at, s) in dense.s.iter().enumerate() {
                let got = factored.s.get(at).copied().unwrap_or(0.0);
                assert!((got - s).abs() <= bound, "{n}×{k} rank {r}: {got} {s}");
            }
            let (a2, b2) = factored.factors(r);
            assert!(distance(&product(&b2, &a2, 1.0), &product(&b, &a, scale)) <= rounding(&factored));
        }
    }

    #[test]
    fn energy_keeps_the_fewest_values_that_reach_the_fraction() {
        let diagonal = HostMatrix::from_fn(4, 4, |i, j| if i == j { [4.0, 2.0, 2.0, 1.0][i] } else { 0.0 }); // squares 16 4 4 1
        let svd = Svd::of(&diagonal).unwrap();
        for (share, want) in [(1e-9, 1), (0.63, 1), (0.65, 2), (0.79, 2), (0.81, 3), (0.95, 3), (0.97, 4), (1.0, 4)] {
            assert_eq!(svd.rank(Keep::Energy(share)).unwrap(), want, "{share}");
        }
        assert_eq!(svd.rank(Keep::Rank(9)).unwrap(), 4);
        let nothing = Svd::of(&HostMatrix::from_fn(3, 2, |_, _| 0.0)).unwrap();
        assert_eq!(nothing.rank(Keep::Energy(0.5)).unwrap(), 1);
    }

    #[test]
    fn pissa_and_olora_of_full_rank_are_the_weight() {
        for (n, k) in [(6, 4), (4, 6), (5, 5)] {
            let w = random(n, k, 4);
            let svd = Svd::of(&w).unwrap();
            let (a, b) = pissa(&w, n.min(k), 2.0).unwrap();
            assert!(distance(&product(&b, &a, 2.0), &values(&w)) <= rounding(&svd));
            let (a, b) = olora(&w, n.min(k)).unwrap();
            assert!(distance(&product(&b, &a, 1.0), &values(&w)) <= rounding(&svd));
            assert_eq!(pissa(&w, 2, 0.5).unwrap(), pissa(&w, 2, 0.5).unwrap());
        }
    }

    #[test]
    fn bad_matrices_and_ranks_are_refused() {
        for strange in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = vec![1.0; 12];
            values[7] = strange;
            let bad = HostMatrix::new((3, 4), values).unwrap();
            let good = random(4, 3, 5);
            let refusals = [
                Svd::of(&bad).err(),
                Svd::of_product(&bad, &good, 1.0).err(),
                Svd::of_product(&good, &bad, 1.0).err(),
                pissa(&bad, 1, 1.0).err(),
                olora(&bad, 1).err(),
            ];
            assert!(refusals.iter().all(|error| matches!(error, Some(Error::Value { .. }))), "{strange}");
        }
        let w = random(3, 4, 6);
        assert!(
            [pissa(&w, 4, 1.0).err(), olora(&w, 4).err(), olora(&w, 0).err(), pissa(&w, 1, 0.0).err()]
                .iter()
                .all(Option::is_some)
        );
        assert!(matches!(Svd::of_product(&w, &w, 1.0), Err(Error::Shape { name: "a", .. })));
        let svd = Svd::of(&w).unwrap();
        for keep in [Keep::Rank(0), Keep::Energy(0.0), Keep::Energy(1.1), Keep::Energy(f64::NAN)] {
            assert!(matches!(svd.rank(keep), Err(Error::Value { .. })), "{keep:?}");
        }
    }

    #[test]
    fn an_empty_matrix_has_rank_zero() {
        for (rows, cols) in [(0, 0), (0, 3), (3, 0)] {
            let svd = Svd::of(&random(rows, cols, 7)).unwrap();
            assert_eq!(svd.rank(Keep::Energy(0.5)).unwrap(), 0);
            let (a, b) = svd.factors(1);
            assert_eq!((a.shape(), b.shape()), ((0, cols).into(), (rows, 0).into()));
        }
    }
}
