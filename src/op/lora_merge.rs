//! `W += scale·B·A`

use super::{Checked, Factor, Rounding, contiguous, finite, fits, one_for_all, rank_of};
use crate::backend::Backend;
use crate::error::Result;
use crate::view::MatMut;

/// `W += scale·B·A`, in place, summed in `f32` and rounded once. Unmerging is merging with `-scale`, up to that rounding.
pub struct LoraMerge<'t, B: Backend> {
    /// `r×k`
    pub a: Factor<'t, B>,
    /// `n×r`
    pub b: Factor<'t, B>,
    /// What the update is multiplied with; negative to unmerge.
    pub scale: f32,
    /// How each sum is rounded to what stores it.
    pub rounding: Rounding,
    /// `n×k`, updated; for [`Rounding::Stochastic`] rows that follow one another
    pub w: MatMut<'t, B>,
}

impl<B: Backend> LoraMerge<'_, B> {
    const VERB: &'static str = "lora_merge";

    /// Compares the shapes; `scale` must be finite and the rank at least 1.
    pub fn check(self) -> Result<Checked<Self>> {
        let (n, k) = (self.w.rows(), self.w.cols());
        let r = rank_of(Self::VERB, self.a.shape())?;
        fits(Self::VERB, "a", (r, k), self.a.shape())?;
        fits(Self::VERB, "b", (n, r), self.b.shape())?;
        one_for_all(Self::VERB, "a", self.a)?;
        one_for_all(Self::VERB, "b", self.b)?;
        finite(Self::VERB, "scale", self.scale)?;
        if self.rounding != Rounding::Nearest {
            contiguous(Self::VERB, "w", self.w.is_contiguous())?;
        }
        Ok(Checked(self))
    }

    /// Checks the shapes and computes.
    pub fn run(self, backend: &B) -> Result<()> {
        backend.lora_merge(self.check()?)
    }
}
