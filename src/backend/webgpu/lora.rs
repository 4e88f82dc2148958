//! The verbs of the low-rank layer, as sums of products.

use super::WebGpu;
use super::linear::bias_in_every_row;
use super::memory::Buffer;
use super::sum::{Finish, Init, Matrix, Sum, matrix};
use crate::element::Float;
use crate::error::Result;
use crate::op::{Dropout, LoraBackward, LoraForward, LoraMerge};
use crate::tensor::Tensor;

impl<E: Float> WebGpu<E> {
    /// `h = drop(x)·Aᵀ`, `y = x·Wᵀ + bias + scale·h·Bᵀ`
    pub(super) fn lora_forward_sums(&self, op: LoraForward<'_, Self>) -> Result<()> {
        let (x, a, b) = (matrix(op.x), matrix(op.a), matrix(op.b));
        let dropped = self.dropped(op.dropout, op.x)?;
        self.sum(Sum::new(matrix(op.h), seen(op.x, &dropped) * a.t()))?;
        let (update, base) = (Some(matrix(op.h) * b.t()), op.w.map(|w| x * matrix(w).t()));
        let init = bias_in_every_row(op.bias, op.x.rows());
        self.sum(Sum { init, scale: op.scale, update, base, finish: Finish::Store(matrix(op.y)) })
    }

    /// `dh = scale·dy·B`, `dA = dhᵀ·drop(x)`, `dB = scale·dyᵀ·h`, `dbias = Σ dy`, `dx = dy·W + drop(dh·A)`
    pub(super) fn lora_backward_sums(&self, op: LoraBackward<'_, Self>) -> Result<()> {
        let (m, k, r) = (op.x.rows(), op.x.cols(), op.a.rows());
        let (a, b, h, dy) = (matrix(op.a), matrix(op.b), matrix(op.h), matrix(op.dy));
        let dropped = self.dropped(op.dropout, op.x)?;

        let dh = Buffer::<f32>::unwritten(&self.gpu, m * r)?;
        let dh = Matrix::new(&dh, m, r);
        self.sum(Sum { scale: op.scale, ..Sum::new(dh, dy * b) })?;
        self.sum(Sum::new(matrix(op.da), dh.t() * seen(op.x, &dropped)))?;
        self.sum(Sum { scale: op.scale, ..Sum::new(matrix(op.db), dy.t() * h) })?;
        self.bias_gradient(op.dy, op.dbias)?;

        let Some(dx) = op.dx else { return Ok(()) };
        let through_w = Sum { base: op.w.map(|w| dy * matrix(w)), ..Sum::new(matrix(dx), dh * a) };
        let Some(dropout) = op.dropout else { return self.sum(through_w) };
        // The mask lies between the update and the sum: drop(dh·A) is made in `f32`, and the sum begins with it.
        let update = Buffer::<f32>::unwritten(&self.gpu, m * k)?;
        self.sum(Sum::new(Matrix::new(&update, m, k), dh * a))?;
        let dropped = self.drop(dropout, &update)?;
        self.sum(Sum { init: Init::Matrix(Matrix::new(&dropped, m, k)), update: None, ..through_w })
    }

    /// `W += scale·B·A`
    pub(super) fn lora_merge_sums(&self, op: LoraMerge<'_, Self>) -> Result<()> {
        let (update, out) = (Some(matrix(op.b) * matrix(op.a)), matrix(op.w));
        let finish = match op.rounding.key(E::DTYPE) {
            Some(key) => Finish::StoreByChance { out, key },
            None => Finish::Store(out),
        };
        self.sum(Sum { finish, init: Init::Output, scale: op.scale, update, base: None })
    }

    /// `drop(x)`, where there is dropout.
    fn dropped(&self, dropout: Option<Dropout>, x: &Tensor<Self>) -> Result<Option<Buffer<f32>>> {
        dropout.map(|dropout| self.drop(dropout, x.buffer())).transpose()
    }
}

/// What the adapter sees of `x`.
fn seen<'a, E: Float>(x: &'a Tensor<WebGpu<E>>, dropped: &'a Option<Buffer<f32>>) -> Matrix<'a> {
    dropped.as_ref().map_or(matrix(x), |dropped| Matrix::new(dropped, x.rows(), x.cols()))
}
