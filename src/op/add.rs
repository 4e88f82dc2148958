//! `y += x`

use super::{Checked, fits};
use crate::backend::Backend;
use crate::error::Result;
use crate::tensor::Tensor;

/// `y += x`: what the tape needs where one value is used twice, so that its two gradients meet.
pub struct Add<'t, B: Backend> {
    /// Any shape.
    pub x: &'t Tensor<B>,
    /// The shape of `x`, updated
    pub y: &'t mut Tensor<B>,
}

impl<B: Backend> Add<'_, B> {
    /// Compares the shapes.
    pub fn check(self) -> Result<Checked<Self>> {
        fits("add", "y", self.x.shape(), self.y.shape())?;
        Ok(Checked(self))
    }

    /// Checks the shapes and computes.
    pub fn run(self, backend: &B) -> Result<()> {
        backend.add(self.check()?)
    }
}
