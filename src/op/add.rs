//! `y += x`.

use super::{Checked, contiguous, fits};
use crate::backend::Backend;
use crate::error::Result;
use crate::view::{MatMut, MatRef};

/// `y += x`. The tape adds up the gradients of a value that is used several times.
pub struct Add<'t, B: Backend> {
    /// Any shape.
    pub x: MatRef<'t, B>,
    /// The shape of `x`, updated
    pub y: MatMut<'t, B>,
}

impl<B: Backend> Add<'_, B> {
    /// Checks the request. Errors: [`Error::Shape`](crate::Error::Shape) naming the operand that does not fit;
    /// [`Error::Value`](crate::Error::Value) for an operand that is not contiguous.
    pub fn check(self) -> Result<Checked<Self>> {
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
