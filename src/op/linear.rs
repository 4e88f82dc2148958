//! `y = x·Wᵀ + bias`, and its derivatives.

use super::{Checked, fits};
use crate::backend::Backend;
use crate::error::Result;
use crate::tensor::Tensor;

/// `y = x·Wᵀ + bias`
pub struct LinearForward<'t, B: Backend> {
    /// `m×k`
    pub x: &'t Tensor<B>,
    /// `n×k`
    pub w: &'t Tensor<B>,
    /// `1×n`
    pub bias: Option<&'t Tensor<B>>,
    /// `m×n`, overwritten
    pub y: &'t mut Tensor<B>,
}

impl<B: Backend> LinearForward<'_, B> {
    const VERB: &'static str = "linear_forward";

    /// Compares the shapes.
    pub fn check(self) -> Result<Checked<Self>> {
        let (m, k, n) = (self.x.rows(), self.w.cols(), self.w.rows());
        fits(Self::VERB, "x", (m, k), self.x.shape())?;
        if let Some(bias) = self.bias {
            fits(Self::VERB, "bias", (1, n), bias.shape())?;
        }
        fits(Self::VERB, "y", (m, n), self.y.shape())?;
        Ok(Checked(self))
    }

    /// Checks the shapes and computes.
    pub fn run(self, backend: &B) -> Result<()> {
        backend.linear_forward(self.check()?)
    }
}

/// `dx = dy·W`, `dW = dyᵀ·x`, `dbias = Σ dy` over the rows; what is `None` is not computed.
///
/// `dW` is for those who want the matrix. A batch of m rows makes it a product of rank m, and [`Adam`](super::Adam) takes
/// the two factors as they are ([`WeightGrad::Factored`](super::WeightGrad)).
pub struct LinearBackward<'t, B: Backend> {
    /// `m×k`
    pub x: &'t Tensor<B>,
    /// `n×k`
    pub w: &'t Tensor<B>,
    /// `m×n`
    pub dy: &'t Tensor<B>,
    /// `m×k`, overwritten
    pub dx: Option<&'t mut Tensor<B>>,
    /// `n×k`, overwritten
    pub dw: Option<&'t mut Tensor<B, f32>>,
    /// `1×n`, overwritten
    pub dbias: Option<&'t mut Tensor<B, f32>>,
}

impl<B: Backend> LinearBackward<'_, B> {
    const VERB: &'static str = "linear_backward";

    /// Compares the shapes.
    pub fn check(self) -> Result<Checked<Self>> {
        let (m, k, n) = (self.x.rows(), self.w.cols(), self.w.rows());
        fits(Self::VERB, "x", (m, k), self.x.shape())?;
        fits(Self::VERB, "dy", (m, n), self.dy.shape())?;
        if let Some(dx) = &self.dx {
            fits(Self::VERB, "dx", (m, k), dx.shape())?;
        }
        if let Some(dw) = &self.dw {
            fits(Self::VERB, "dw", (n, k), dw.shape())?;
        }
        if let Some(dbias) = &self.dbias {
            fits(Self::VERB, "dbias", (1, n), dbias.shape())?;
        }
        Ok(Checked(self))
    }

    /// Checks the shapes and computes.
    pub fn run(self, backend: &B) -> Result<()> {
        backend.linear_backward(self.check()?)
    }
}
