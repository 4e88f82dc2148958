//! `y = max(x, 0)`, and its derivative.

use super::{Checked, contiguous, fits};
use crate::backend::Backend;
use crate::error::Result;
use crate::view::{MatMut, MatRef};

/// `y = max(x, 0)`; NaN stays NaN.
pub struct Relu<'t, B: Backend> {
    /// Any shape.
    pub x: MatRef<'t, B>,
    /// The shape of `x`, overwritten
    pub y: MatMut<'t, B>,
}

impl<B: Backend> Relu<'_, B> {
    /// Checks the request. Errors: [`Error::Shape`](crate::Error::Shape) naming the operand that does not fit;
    /// [`Error::Value`](crate::Error::Value) for an operand that is not contiguous.
    pub fn check(self) -> Result<Checked<Self>> {
        fits("relu", "y", self.x.shape(), self.y.shape())?;
        contiguous("relu", "x", self.x.is_contiguous())?;
        contiguous("relu", "y", self.y.is_contiguous())?;
        Ok(Checked(self))
    }

    /// [`check`](Self::check)s the request and computes it. Errors: those of `check` and of the device.
    pub fn run(self, backend: &B) -> Result<()> {
        backend.relu(self.check()?)
    }
}

/// `dx = dy` where `y > 0`, else 0, with the output `y` of [`Relu`]. Where `y` is NaN, `dx` is 0, unlike in PyTorch, where it
/// is `dy`.
pub struct ReluBackward<'t, B: Backend> {
    /// Any shape.
    pub y: MatRef<'t, B>,
    /// The shape of `y`
    pub dy: MatRef<'t, B>,
    /// The shape of `y`, overwritten
    pub dx: MatMut<'t, B>,
}

impl<B: Backend> ReluBackward<'_, B> {
    /// Checks the request. Errors: [`Error::Shape`](crate::Error::Shape) naming the operand that does not fit;
    /// [`Error::Value`](crate::Error::Value) for an operand that is not contiguous.
    pub fn check(self) -> Result<Checked<Self>> {
        fits("relu_backward", "dy", self.y.shape(), self.dy.shape())?;
        fits("relu_backward", "dx", self.y.shape(), self.dx.shape())?;
        contiguous("relu_backward", "y", self.y.is_contiguous())?;
        contiguous("relu_backward", "dy", self.dy.is_contiguous())?;
        contiguous("relu_backward", "dx", self.dx.is_contiguous())?;
        Ok(Checked(self))
    }

    /// [`check`](Self::check)s the request and computes it. Errors: those of `check` and of the device.
    pub fn run(self, backend: &B) -> Result<()> {
        backend.relu_backward(self.check()?)
    }
}
