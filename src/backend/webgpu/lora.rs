//! The verbs of the low-rank layer, as sums of products.

use super::WebGpu;
use super::aliasing::{check_aliasing, read, read_factor, written};
use super::linear::bias_in_every_row;
use super::memory::Buffer;
use super::sum::{Epilogue, Init, Matrix, Sum, factor, matrix};
use crate::backend::Backend;
use crate::element::Float;
use crate::error::Result;
use crate::op::{Dropout, LoraBackward, LoraForward, LoraMerge};
use crate::tensor::Shape;
use crate::view::{MatMut, MatRef};

impl<E: Float> WebGpu<E> {
    /// `h = drop(x)·Aᵀ`, `y = x·Wᵀ + bias + scale·h·Bᵀ`
    pub(super) fn lora_forward_sums(&self, op: LoraForward<'_, Self>) -> Result<()> {
        let (x, w, bias, h) = (op.x, op.w.map(|w| w.dense()), op.bias, op.h.into_ref());
        let (y, accumulate) = op.y.into_parts();
        let y = y.into_ref();
        let reads = [w.map(|w| read("w", w)), bias.map(|bias| read("bias", bias)), Some(read("x", x))].into_iter().flatten();
        let factors = [read_factor("a", op.a), read_factor("b", op.b)];
        // The second sum reads what the first one wrote.
        check_aliasing("lora_forward", reads.chain(factors).chain([written("h", h), read("h", h), written("y", y)]))?;

        let (a, b) = (factor(op.a), factor(op.b));
        let dropped = self.dropped(op.dropout, x)?;
        self.sum(Sum::new(matrix(h), adapter_input(x, &dropped) * a.t()))?;
        let (update, base) = (Some(matrix(h) * b.t()), w.map(|w| matrix(x) * matrix(w).t()));
        let init = bias_in_every_row(bias, x.rows(), accumulate);
        self.sum(Sum { init, scale: op.scale, update, base, epilogue: Epilogue::Store(matrix(y)) })
    }

    /// `dh = scale·dy·B`, `dA = dhᵀ·drop(x)`, `dB = scale·dyᵀ·h`, `dbias = Σ dy`, `dx = dy·W + drop(dh·A)`
    pub(super) fn lora_backward_sums(&self, op: LoraBackward<'_, Self>) -> Result<()> {
        let (x, w, dbias) = (op.x, op.w.map(|w| w.dense()), op.dbias.map(MatMut::into_ref));
        let (da, db, dx) = (op.da.into_ref(), op.db.into_ref(), op.dx.map(|dx| dx.into_parts()));
        let dx = dx.map(|(dx, accumulate)| (dx.into_ref(), accumulate));
        let reads = [read("x", x), read_factor("a", op.a), read_factor("b", op.b), read("h", op.h), read("dy", op.dy)];
        let writes = [written("da", da), written("db", db)];
        let others = [w.map(|w| read("w", w)), dbias.map(|d| written("dbias", d)), dx.map(|(dx, _)| written("dx", dx))];
        check_aliasing("lora_backward", reads.into_iter().chain(others.into_iter().flatten()).chain(writes))?;

        let (m, k, r) = (x.rows(), x.cols(), op.a.rows());
        let (a, b, h, dy) = (factor(op.a), factor(op.b), matrix(op.h), matrix(op.dy));
        let dropped = self.dropped(op.dropout, x)?;
        let dh = Buffer::<f32>::unwritten(&self.gpu, m * r)?;
        let dh = Matrix::new(&dh, m, r);
        self.sum(Sum { scale: op.scale, ..Sum::new(dh, dy * b) })?;
        self.sum(Sum::new(matrix(da), dh.t() * adapter_input(x, &dropped)))?;
        self.sum(Sum { scale: op.scale, ..Sum::new(matrix(db), dy.t() * h) })?;
        self.bias_gradient(op.dy, dbias)?;

        let Some((dx, accumulate)) = dx else { return Ok(()) };
        let base = w.map(|w| dy * matrix(w));
        let through_w = Sum { base, init: Init::new(None, accumulate), ..Sum::new(matrix(dx), dh * a) };
        let Some(dropout) = op.dropout else { return self.sum(through_w) };
        // The mask applies to the update alone: drop(dh·A) is made in `f32`, and the sum begins with it.
        let update = Buffer::<f32>::unwritten(&self.gpu, m * k)?;
        self.sum(Sum::new(Matrix::new(&update, m, k), dh * a))?;
        let dropped = self.drop(dropout, MatRef::all(update.slice(), Shape { rows: m, cols: k }))?;
        self.sum(Sum { init: Init::new(Some(Matrix::new(&dropped, m, k)), accumulate), update: None, ..through_w })
    }

    /// `W += scale·B·A`
    pub(super) fn lora_merge_sums(&self, op: LoraMerge<'_, Self>) -> Result<()> {
        let w = op.w.into_ref();
        check_aliasing("lora_merge", [read_factor("a", op.a), read_factor("b", op.b), written("w", w)].into_iter())?;
        let (update, out) = (Some(factor(op.b) * factor(op.a)), matrix(w));
        let epilogue = match op.rounding.key(E::DTYPE) {
            Some(key) => Epilogue::StoreStochastic { out, key },
            None => Epilogue::Store(out),
        };
        self.sum(Sum { epilogue, init: Init::Output, scale: op.scale, update, base: None })
    }

    /// `drop(x)`; `None` without dropout.
    fn dropped(&self, dropout: Option<Dropout>, x: MatRef<'_, Self>) -> Result<Option<Buffer<f32>>> {
        let Some(dropout) = dropout else { return Ok(None) };
        if x.is_contiguous() {
            return self.drop(dropout, x).map(Some);
        }
        // The mask counts the elements of a contiguous matrix, so x is copied to one first.
        let mut together = Buffer::unwritten(&self.gpu, x.rows() * x.cols())?;
        self.copy(x, MatMut::all(together.slice_mut(), x.shape()))?;
        self.drop(dropout, MatRef::all(together.slice(), x.shape())).map(Some)
    }
}

/// The input of the adapter: `x`, or `drop(x)`.
fn adapter_input<'a, E: Float>(x: MatRef<'a, WebGpu<E>>, dropped: &'a Option<Buffer<f32>>) -> Matrix<'a> {
    dropped.as_ref().map_or(matrix(x), |dropped| Matrix::new(dropped, x.rows(), x.cols()))
}
