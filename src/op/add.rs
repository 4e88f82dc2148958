//! `y += x`

use super::{Checked, contiguous, fits};
use crate::backend::Backend;
use crate::error::Result;
use crate::view::{MatMut, MatRef};

/// `y += x`: what the tape needs where one value is used twice, so that its two gradients meet.
pub struct Add<'t, B: Backend> {
    /// Any shape.
    pub x: MatRef<'t, B>,
    /// The shape of `x`, updated
    pub y: MatMut<'t, B>,
}

impl<B: Backend> Add<'_, B> {
    /// Compares the shapes.
    pub fn check(self) -> Result<Checked<Self>> {
        fits("add", "y", self.x.shape(), self.y.shape())?;
        contiguous("add", "x", self.x.is_contiguous())?;
        contiguous("add", "y", self.y.is_contiguous())?;
        Ok(Checked(self))
    }

    /// Checks the shapes and computes.
    pub fn run(self, backend: &B) -> Result<()> {
        backend.add(self.check()?)
    }
}
