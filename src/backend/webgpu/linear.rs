//! `y = x·Wᵀ + bias`, and its derivatives, as sums of products.

use super::WebGpu;
use super::sum::{Init, Matrix, Sum, matrix};
use crate::element::Float;
use crate::error::Result;
use crate::op::{LinearBackward, LinearForward};
use crate::tensor::Tensor;

impl<E: Float> WebGpu<E> {
    /// `y = x·Wᵀ + bias`
    pub(super) fn linear_forward_sums(&self, op: LinearForward<'_, Self>) -> Result<()> {
        let base = matrix(op.x) * matrix(op.w).t();
        self.sum(Sum { init: bias_in_every_row(op.bias, op.x.rows()), ..Sum::base(matrix(op.y), base) })
    }

    /// `dx = dy·W`, `dW = dyᵀ·x`, `dbias = Σ dy`
    pub(super) fn linear_backward_sums(&self, op: LinearBackward<'_, Self>) -> Result<()> {
        let (x, w, dy) = (matrix(op.x), matrix(op.w), matrix(op.dy));
        if let Some(dx) = op.dx {
            self.sum(Sum::base(matrix(dx), dy * w))?;
        }
        if let Some(dw) = op.dw {
            self.sum(Sum::new(matrix(dw), dy.t() * x))?;
        }
        self.bias_gradient(op.dy, op.dbias)
    }

    /// `dbias = 1ᵀ·dy`
    pub(super) fn bias_gradient(&self, dy: &Tensor<Self>, dbias: Option<&mut Tensor<Self, f32>>) -> Result<()> {
        let Some(dbias) = dbias else { return Ok(()) };
        let ones = Matrix::splat(&self.one, 1, dy.rows());
        self.sum(Sum::new(matrix(dbias), ones * matrix(dy)))
    }
}

/// What `y` begins with.
pub(super) fn bias_in_every_row<E: Float>(bias: Option<&Tensor<WebGpu<E>>>, rows: usize) -> Init<'_> {
    bias.map_or(Init::Zero, |bias| Init::Matrix(matrix(bias).repeated(rows)))
}
