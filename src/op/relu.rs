//! `y = max(x, 0)`, and its derivative.

use super::{Checked, fits};
use crate::backend::Backend;
use crate::error::Result;
use crate::tensor::Tensor;

/// `y = max(x, 0)`; NaN stays NaN.
pub struct Relu<'t, B: Backend> {
    /// Any shape.
    pub x: &'t Tensor<B>,
    /// The shape of `x`, overwritten
    pub y: &'t mut Tensor<B>,
}

impl<B: Backend> Relu<'_, B> {
    /// Compares the shapes.
    pub fn check(self) -> Result<Checked<Self>> {
        fits("relu", "y", self.x.shape(), self.y.shape())?;
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
    pub y: &'t Tensor<B>,
    /// The shape of `y`
    pub dy: &'t Tensor<B>,
    /// The shape of `y`, overwritten
    pub dx: &'t mut Tensor<B>,
}

impl<B: Backend> ReluBackward<'_, B> {
    /// Compares the shapes.
    pub fn check(self) -> Result<Checked<Self>> {
        fits("relu_backward", "dy", self.y.shape(), self.dy.shape())?;
        fits("relu_backward", "dx", self.y.shape(), self.dx.shape())?;
        Ok(Checked(self))
    }

    /// Checks the shapes and computes.
    pub fn run(self, backend: &B) -> Result<()> {
        backend.relu_backward(self.check()?)
    }
}
