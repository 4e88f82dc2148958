//! `norm = ‖W + scale·B·A‖` by rows

use super::{Checked, Factor, Weight, finite, fits, one_for_all, rank_of};
use crate::backend::Backend;
use crate::error::Result;
use crate::view::MatMut;

/// `norm = ‖W + scale·B·A‖` by rows: DoRA's, from the factors.
///
/// `W` is read once, and no matrix of its size is made: each element of the sum is made from its row of `B` and its column of
/// `A`, squared, and gone. The expansion `‖W‖² + 2·scale·B·(A·Wᵀ) + scale²·B·(A·Aᵀ)·Bᵀ` costs as many multiply-adds, but where
/// the update undoes most of a row it subtracts large numbers from each other; a sum of squares keeps its digits, and is
/// never negative.
pub struct LoraRowNorm<'t, B: Backend> {
    /// `n×k`
    pub w: Weight<'t, B>,
    /// `r×k`
    pub a: Factor<'t, B>,
    /// `n×r`
    pub b: Factor<'t, B>,
    /// What the update is multiplied with.
    pub scale: f32,
    /// `1×n`, overwritten
    pub norm: MatMut<'t, B, f32>,
}

impl<B: Backend> LoraRowNorm<'_, B> {
    const VERB: &'static str = "lora_row_norm";

    /// Compares the shapes; `scale` must be finite and the rank at least 1.
    pub fn check(self) -> Result<Checked<Self>> {
        let (n, k) = (self.w.rows(), self.w.cols());
        let r = rank_of(Self::VERB, self.a.shape())?;
        fits(Self::VERB, "a", (r, k), self.a.shape())?;
        fits(Self::VERB, "b", (n, r), self.b.shape())?;
        one_for_all(Self::VERB, "a", self.a)?;
        one_for_all(Self::VERB, "b", self.b)?;
        finite(Self::VERB, "scale", self.scale)?;
        fits(Self::VERB, "norm", (1, n), self.norm.shape())?;
        Ok(Checked(self))
    }

    /// Checks the shapes and computes.
    pub fn run(self, backend: &B) -> Result<()> {
        backend.lora_row_norm(self.check()?)
    }
}
