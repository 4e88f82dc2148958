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
    /// Compares the shapes.
    pub fn check(self) -> Result<Checked<Self>> {
        fits("relu", "y", self.x.shape(), self.y.shape())?;
        contiguous("relu", "x", self.x.is_contiguous())?;
        contiguous("relu", "y", self.y.is_contiguous())?;
        Ok(Checked(self))
    }

    /// Checks the shapes and computes.
    pub fn run(self, backend: &B) -> Result<()> {
        backend.relu(self.check()?)
    }
}

/// `dx = dy` where `y > 0`, else 0. It needs what relu put out, not what it took in. Where `y` is NaN `dx` is 0; PyTorch passes
/// `dy` on there.
pub struct ReluBackward<'t, B: Backend> {
    /// Any shape.
    pub y: MatRef<'t, B>,
    /// The shape of `y`
    pub dy: MatRef<'t, B>,
    /// The shape of `y`, overwritten
    pub dx: MatMut<'t, B>,
}

impl<B: Backend> ReluBackward<'_, B> {
    /// Compares the shapes.
    pub fn check(self) -> Result<Checked<Self>> {
        fits("relu_backward", "dy", self.y.shape(), self.dy.shape())?;
        fits("relu_backward", "dx", self.y.shape(), self.dx.shape())?;
        contiguous("relu_backward", "y", self.y.is_contiguous())?;
        contiguous("relu_backward", "dy", self.dy.is_contiguous())?;
        contiguous("relu_backward", "dx", self.dx.is_contiguous())?;
        Ok(Checked(self))
    }

    /// Checks the shapes and computes.
    pub fn run(self, backend: &B) -> Result<()> {
        backend.relu_backward(self.check()?)
    }
}
