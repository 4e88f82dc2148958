//! Initial values of weights and factors.

use crate::backend::Backend;
use crate::element::Float;
use crate::error::{Error, Result};
use crate::random::Rng;
use crate::tensor::{Shape, Tensor};

/// The initial values of the factors of an adapter: PEFT's `init_lora_weights`. Unless said otherwise `B` is zero, so a new adapter
/// changes nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// `true`: `A` uniform in `±1/√k`, PyTorch's Kaiming-uniform with `a = √5`.
    KaimingUniform,
    /// `gaussian`: `A` normally distributed with mean 0 and this standard deviation; PEFT uses `1/r`.
    Gaussian {
        /// The standard deviation.
        std: f32,
    },
    /// `false`: `A` as Kaiming-uniform, and `B` uniform in `±1/√r`. The adapter changes the model even before training: for tests.
    NonZero,
    /// `orthogonal`: `A` and `B` are random combinations of two halves of an orthonormal basis, so that `B·A = 0` although neither
    /// factor is zero. The rank must be even.
    Orthogonal,
}

impl Init {
    /// Errors: [`Error::Value`] for a standard deviation that is not finite, or an odd rank with [`Init::Orthogonal`].
    pub fn check(self, rank: usize) -> Result<()> {
        match self {
            Init::Gaussian { std } => Error::unless(std.is_finite(), "lora", "std", std, "a finite number"),
            Init::Orthogonal => Error::unless(rank.is_multiple_of(2), "lora", "rank", rank, "even, for orthogonal factors"),
            Init::KaimingUniform | Init::NonZero => Ok(()),
        }
    }

    /// Values for one `out × in` matrix: normally distributed for [`Init::Gaussian`], Kaiming-uniform otherwise.
    pub fn tensor<B: Backend>(self, backend: &B, shape: impl Into<Shape>, rng: &mut Rng) -> Result<Tensor<B>> {
        let shape = shape.into();
        let bound = 1.0 / (shape.cols.max(1) as f64).sqrt();
        let mut number = || match self {
            Init::Gaussian { std } => f64::from(std) * rng.gaussian(),
            Init::KaimingUniform | Init::NonZero | Init::Orthogonal => rng.uniform(-bound, bound),
        };
        filled(backend, shape, |_, _| number())
    }

    /// `A r×k` and `B n×r` of a new adapter.
    pub(super) fn factors<B: Backend>(
        self,
        backend: &B,
        (n, k, r): (usize, usize, usize),
        rng: &mut Rng,
    ) -> Result<(Tensor<B>, Tensor<B>)> {
        match self {
            Init::KaimingUniform | Init::Gaussian { .. } => {
                Ok((self.tensor(backend, (r, k), rng)?, Tensor::zeros(backend, (n, r))?))
            }
            Init::NonZero => Ok((self.tensor(backend, (r, k), rng)?, self.tensor(backend, (n, r), rng)?)),
            Init::Orthogonal => {
                for shape in [(r, r), (r, k), (n, r)] {
                    Shape::from(shape).elements()?; // refuse sizes that overflow before any of them is allocated
                }
                let basis = orthonormal_rows(r, rng);
                let mut combine = |first: usize| {
                    let weights: Vec<f64> = (0..r / 2).map(|_| rng.gaussian() / 10.0).collect();
                    move |basis: &[Vec<f64>], j: usize| -> f64 {
                        weights.iter().enumerate().map(|(half, weight)| weight * basis[2 * half + first][j]).sum()
                    }
                };
                let columns: Vec<_> = (0..k).map(|_| combine(0)).collect();
                let a = filled(backend, (r, k).into(), |i, j| columns[j](&basis, i))?;
                let rows: Vec<_> = (0..n).map(|_| combine(1)).collect();
                let b = filled(backend, (n, r).into(), |i, j| rows[i](&basis, j))?;
                Ok((a, b))
            }
        }
    }
}

/// A matrix with the elements `at(row, column)`, computed in row-major order.
fn filled<B: Backend>(backend: &B, shape: Shape, mut at: impl FnMut(usize, usize) -> f64) -> Result<Tensor<B>> {
    let mut host = room_for(shape)?;
    host.extend((0..shape.elements()?).map(|e| B::Elem::from_f32(at(e / shape.cols, e % shape.cols) as f32)));
    Tensor::from_slice(backend, shape, &host)
}

/// An empty vector with capacity for a matrix. Errors: [`Error::TooLarge`], [`Error::OutOfMemory`].
pub(super) fn room_for<E: Float>(shape: Shape) -> Result<Vec<E>> {
    let (mut host, len) = (Vec::new(), shape.elements()?);
    let no_room = |_| Error::OutOfMemory { backend: "host", bytes: len * size_of::<E>() };
    host.try_reserve_exact(len).map_err(no_room)?;
    Ok(host)
}

/// `r` random orthonormal rows, by Gram-Schmidt: from each new row its components along the earlier rows are subtracted, twice, because
/// the first pass leaves rounding errors.
fn orthonormal_rows(r: usize, rng: &mut Rng) -> Vec<Vec<f64>> {
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    let mut rows: Vec<Vec<f64>> = Vec::new();
    while rows.len() < r {
        let mut new: Vec<f64> = (0..r).map(|_| rng.gaussian()).collect();
        for row in rows.iter().chain(&rows) {
            let along = dot(&new, row);
            new.iter_mut().zip(row).for_each(|(x, y)| *x -= along * y);
        }
        let length = dot(&new, &new).sqrt();
        if length > 1e-6 {
            rows.push(new.into_iter().map(|x| x / length).collect());
        }
    }
    rows
}
