//! `y += scale·x`, in `f32`.

use super::{Checked, contiguous, finite, fits};
use crate::backend::Backend;
use crate::error::Result;
use crate::view::{MatMut, MatRef};

/// `y += scale·x`, in `f32`. It adds up, averages and clips gradients of several batches.
pub struct Accumulate<'t, B: Backend> {
    /// Any shape.
    pub x: MatRef<'t, B, f32>,
    /// Factor of `x`.
    pub scale: f32,
    /// The shape of `x`, updated
    pub y: MatMut<'t, B, f32>,
}

impl<B: Backend> Accumulate<'_, B> {
    const VERB: &'static str = "accumulate";

    /// Checks the request. Errors: [`Error::Shape`](crate::Error::Shape) naming the operand that does not fit;
    /// [`Error::Value`](crate::Error::Value) unless `scale` is finite, and `x` and `y` contiguous.
    pub fn check(self) -> Result<Checked<Self>> {
        finite(Self::VERB, "scale", self.scale)?;
        fits(Self::VERB, "y", self.x.shape(), self.y.shape())?;
        contiguous(Self::VERB, "x", self.x.is_contiguous())?;
        contiguous(Self::VERB, "y", self.y.is_contiguous())?;
        Ok(Checked(self))
    }

    /// [`check`](Self::check)s the request and computes it. Errors: those of `check` and of the device.
    pub fn run(self, backend: &B) -> Result<()> {
        backend.accumulate(self.check()?)
    }
}
