//! `y += scale·x`, in `f32`

use super::{Checked, contiguous, finite, fits};
use crate::backend::Backend;
use crate::error::Result;
use crate::view::{MatMut, MatRef};

/// `y += scale·x`, in `f32`: gradients of several batches added up, or averaged, or clipped.
pub struct Accumulate<'t, B: Backend> {
    /// Any shape.
    pub x: MatRef<'t, B, f32>,
    /// What `x` is multiplied with.
    pub scale: f32,
    /// The shape of `x`, updated
    pub y: MatMut<'t, B, f32>,
}

impl<B: Backend> Accumulate<'_, B> {
    const VERB: &'static str = "accumulate";

    /// Compares the shapes; `scale` must be finite.
    pub fn check(self) -> Result<Checked<Self>> {
        finite(Self::VERB, "scale", self.scale)?;
        fits(Self::VERB, "y", self.x.shape(), self.y.shape())?;
        contiguous(Self::VERB, "x", self.x.is_contiguous())?;
        contiguous(Self::VERB, "y", self.y.is_contiguous())?;
        Ok(Checked(self))
    }

    /// Checks the shapes and computes.
    pub fn run(self, backend: &B) -> Result<()> {
        backend.accumulate(self.check()?)
    }
}
