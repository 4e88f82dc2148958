//! `norm = ‖W + scale·B·A‖`, row by row.

use super::{Checked, Factor, Weight, finite, fits, rank_of};
use crate::backend::Backend;
use crate::error::Result;
use crate::view::MatMut;

/// `norm = ‖W + scale·B·A‖`, the Euclidean norm of each row, which DoRA needs.
///
/// `W` is read once and no matrix of its size is stored: each element of `W + scale·B·A` is computed, squared and added up. The
/// expansion `‖W‖² + 2·scale·B·(A·Wᵀ) + scale²·B·(A·Aᵀ)·Bᵀ` takes as many multiply-adds, but suffers from cancellation where
/// the update is close to `-W`. A sum of squares does not, and is never negative.
pub struct LoraRowNorm<'t, B: Backend> {
    /// `n×k`
    pub w: Weight<'t, B>,
    /// `r×k`
    pub a: Factor<'t, B>,
    /// `n×r`
    pub b: Factor<'t, B>,
    /// Factor of the update.
    pub scale: f32,
    /// `1×n`, overwritten
    pub norm: MatMut<'t, B, f32>,
}

impl<B: Backend> LoraRowNorm<'_, B> {
    const VERB: &'static str = "lora_row_norm";

    /// Checks the request. Errors: [`Error::Shape`](crate::Error::Shape) naming the operand that does not fit;
    /// [`Error::Value`](crate::Error::Value) unless `scale` is finite and the rank at least 1.
    pub fn check(self) -> Result<Checked<Self>> {
        let (n, k) = (self.w.rows(), self.w.cols());
        let r = rank_of(Self::VERB, self.a.shape())?;
        fits(Self::VERB, "a", (r, k), self.a.shape())?;
        fits(Self::VERB, "b", (n, r), self.b.shape())?;
        finite(Self::VERB, "scale", self.scale)?;
        fits(Self::VERB, "norm", (1, n), self.norm.shape())?;
        Ok(Checked(self))
    }

    /// [`check`](Self::check)s the request and computes it. Errors: those of `check` and of the device.
    pub fn run(self, backend: &B) -> Result<()> {
        backend.lora_row_norm(self.check()?)
    }
}
