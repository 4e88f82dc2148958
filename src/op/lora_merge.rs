//! `W += scale·B·A`.

use super::{Checked, Factor, Rounding, contiguous, finite, fits, rank_of};
use crate::backend::Backend;
use crate::error::Result;
use crate::view::MatMut;

/// `W += scale·B·A`, in place, summed in `f32` and rounded once. Merging with `-scale` unmerges, up to this rounding.
pub struct LoraMerge<'t, B: Backend> {
    /// `r×k`
    pub a: Factor<'t, B>,
    /// `n×r`
    pub b: Factor<'t, B>,
    /// Factor of the update; negative to unmerge.
    pub scale: f32,
    /// How each sum is rounded to the element type of `w`.
    pub rounding: Rounding,
    /// `n×k`, updated; contiguous for [`Rounding::Stochastic`]
    pub w: MatMut<'t, B>,
}

impl<B: Backend> LoraMerge<'_, B> {
    const VERB: &'static str = "lora_merge";

    /// Checks the request. Errors: [`Error::Shape`](crate::Error::Shape) naming the operand that does not fit;
    /// [`Error::Value`](crate::Error::Value) unless `scale` is finite and the rank at least 1, and for
    /// stochastic rounding of a `w` that is not contiguous.
    pub fn check(self) -> Result<Checked<Self>> {
        let (n, k) = (self.w.rows(), self.w.cols());
        let r = rank_of(Self::VERB, self.a.shape())?;
        fits(Self::VERB, "a", (r, k), self.a.shape())?;
        fits(Self::VERB, "b", (n, r), self.b.shape())?;
        finite(Self::VERB, "scale", self.scale)?;
        if self.rounding != Rounding::Nearest {
            contiguous(Self::VERB, "w", self.w.is_contiguous())?;
        }
        Ok(Checked(self))
    }

    /// [`check`](Self::check)s the request and computes it. Errors: those of `check` and of the device.
    pub fn run(self, backend: &B) -> Result<()> {
        backend.lora_merge(self.check()?)
    }
}
