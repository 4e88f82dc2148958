//! `y += scale·x`.

use super::{Checked, contiguous, finite, fits};
use crate::backend::Backend;
use crate::error::Result;
use crate::view::{MatMut, MatRef};

/// `y += scale·x`, summed in `f32` and rounded once.
pub struct Add<'t, B: Backend> {
    /// Any shape.
    pub x: MatRef<'t, B>,
    /// Factor of `x`.
    pub scale: f32,
    /// The shape of `x`, updated
    pub y: MatMut<'t, B>,
}

impl<B: Backend> Add<'_, B> {
    /// Checks the request. Errors: [`Error::Shape`](crate::Error::Shape) naming the operand that does not fit;
    /// [`Error::Value`](crate::Error::Value) for an operand that is not contiguous, or a `scale` that is not finite.
    pub fn check(self) -> Result<Checked<Self>> {
        finite("add", "scale", self.scale)?;
        fits("add", "y", self.x.shape(), self.y.shape())?;
        contiguous("add", "x", self.x.is_contiguous())?;
        contiguous("add", "y", self.y.is_contiguous())?;
        Ok(Checked(self))
    }

    /// [`check`](Self::check)s the request and computes it. Errors: those of `check` and of the device.
    pub fn run(self, backend: &B) -> Result<()> {
        backend.add(self.check()?)
    }
}
