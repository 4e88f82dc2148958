//! `y = x·Wᵀ + bias`, and its derivatives.

use super::{Checked, Output, Weight, contiguous, fits};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::view::{MatMut, MatRef};

/// `y = x·Wᵀ + bias`
pub struct LinearForward<'t, B: Backend> {
    /// `m×k`
    pub x: MatRef<'t, B>,
    /// `n×k`
    pub w: Weight<'t, B>,
    /// `1×n`
    pub bias: Option<MatRef<'t, B>>,
    /// `m×n`, overwritten or added to
    pub y: Output<'t, B>,
}

impl<B: Backend> LinearForward<'_, B> {
    const VERB: &'static str = "linear_forward";

    /// Checks the request. Errors: [`Error::Shape`] naming the operand that does not fit.
    pub fn check(self) -> Result<Checked<Self>> {
        let (m, k, n) = (self.x.rows(), self.w.cols(), self.w.rows());
        fits(Self::VERB, "x", (m, k), self.x.shape())?;
        if let Some(bias) = self.bias {
            fits(Self::VERB, "bias", (1, n), bias.shape())?;
        }
        fits(Self::VERB, "y", (m, n), self.y.shape())?;
        Ok(Checked(self))
    }

    /// [`check`](Self::check)s the request and computes it. Errors: those of `check` and of the device.
    pub fn run(self, backend: &B) -> Result<()> {
        backend.linear_forward(self.check()?)
    }
}

/// `dx = dy·W`, `dW = dyᵀ·x`, `dbias = Σ dy` over the rows. Outputs that are `None` are not computed.
///
/// Training does not need `dW` as a matrix: [`Adam`](super::Adam) takes the two factors `dy` and `x`
/// ([`WeightGrad::Factored`](super::WeightGrad)).
pub struct LinearBackward<'t, B: Backend> {
    /// `m×k`; needed only for `dw`
    pub x: Option<MatRef<'t, B>>,
    /// `n×k`; needed only for `dx`
    pub w: Option<Weight<'t, B>>,
    /// `m×n`
    pub dy: MatRef<'t, B>,
    /// `m×k`, overwritten or added to
    pub dx: Option<Output<'t, B>>,
    /// `n×k`, overwritten; contiguous
    pub dw: Option<MatMut<'t, B, f32>>,
    /// `1×n`, overwritten
    pub dbias: Option<MatMut<'t, B, f32>>,
}

impl<B: Backend> LinearBackward<'_, B> {
    const VERB: &'static str = "linear_backward";

    /// Checks the request. Errors: [`Error::Shape`] naming the operand that does not fit; [`Error::Value`] for `dx` without
    /// `w`, `dw` without `x`, and a `dw` that is not contiguous.
    pub fn check(self) -> Result<Checked<Self>> {
        let (m, n) = (self.dy.rows(), self.dy.cols());
        if let Some(w) = self.w {
            fits(Self::VERB, "w", (n, w.cols()), w.shape())?;
        }
        if let Some(x) = self.x {
            fits(Self::VERB, "x", (m, self.w.map_or(x.cols(), |w| w.cols())), x.shape())?;
        }
        if let Some(dx) = &self.dx {
            let w = self.w.ok_or_else(|| missing("w", "the weight, to compute `dx`"))?;
            fits(Self::VERB, "dx", (m, w.cols()), dx.shape())?;
        }
        if let Some(dw) = &self.dw {
            let x = self.x.ok_or_else(|| missing("x", "the input, to compute `dw`"))?;
            fits(Self::VERB, "dw", (n, x.cols()), dw.shape())?;
            contiguous(Self::VERB, "dw", dw.is_contiguous())?;
        }
        if let Some(dbias) = &self.dbias {
            fits(Self::VERB, "dbias", (1, n), dbias.shape())?;
        }
        Ok(Checked(self))
    }

    /// [`check`](Self::check)s the request and computes it. Errors: those of `check` and of the device.
    pub fn run(self, backend: &B) -> Result<()> {
        backend.linear_backward(self.check()?)
    }
}

/// The error for an operand that is `None` and that an output needs.
fn missing(name: &'static str, want: &'static str) -> Error {
    Error::Value { verb: "linear_backward", name, got: "missing".into(), want: want.into() }
}
