//! `y = x·Wᵀ + bias`, and its derivatives, as sums of products.

use super::WebGpu;
use super::aliasing::{check_aliasing, read, written};
use super::sum::{Epilogue, Init, Matrix, Sum, matrix};
use crate::element::Float;
use crate::error::Result;
use crate::op::{LinearBackward, LinearForward};
use crate::view::{MatMut, MatRef};

impl<E: Float> WebGpu<E> {
    /// `y = x·Wᵀ + bias`
    pub(super) fn linear_forward_sums(&self, op: LinearForward<'_, Self>) -> Result<()> {
        let (x, w, bias, (y, accumulate)) = (op.x, op.w.dense(), op.bias, op.y.into_parts());
        let y = y.into_ref();
        let reads = [Some(read("x", x)), Some(read("w", w)), bias.map(|bias| read("bias", bias))];
        check_aliasing("linear_forward", reads.into_iter().flatten().chain([written("y", y)]))?;
        let (init, base) = (bias_in_every_row(bias, x.rows(), accumulate), matrix(x) * matrix(w).t());
        self.sum(Sum { init, ..Sum::base(matrix(y), base) })
    }

    /// `dx = dy·W`, `dW = dyᵀ·x`, `dbias = Σ dy`
    pub(super) fn linear_backward_sums(&self, op: LinearBackward<'_, Self>) -> Result<()> {
        let (x, w, dy) = (op.x, op.w.map(|w| w.dense()), op.dy);
        let (dx, accumulate) = op.dx.map_or((None, false), |dx| {
            let (dx, accumulate) = dx.into_parts();
            (Some(dx.into_ref()), accumulate)
        });
        let (dw, dbias) = (op.dw.map(MatMut::into_ref), op.dbias.map(MatMut::into_ref));
        let reads = [x.map(|x| read("x", x)), w.map(|w| read("w", w)), Some(read("dy", dy))];
        let writes = [dx.map(|dx| written("dx", dx)), dw.map(|dw| written("dw", dw)), dbias.map(|d| written("dbias", d))];
        check_aliasing("linear_backward", reads.into_iter().chain(writes).flatten())?;
        if let (Some(dx), Some(w)) = (dx, w) {
            self.sum(Sum { init: Init::new(None, accumulate), ..Sum::base(matrix(dx), matrix(dy) * matrix(w)) })?;
        }
        if let (Some(dw), Some(x)) = (dw, x) {
            self.sum(Sum::new(matrix(dw), matrix(dy).t() * matrix(x)))?;
        }
        self.bias_gradient(dy, dbias)
    }

    /// `dbias = 1ᵀ·dy`
    pub(super) fn bias_gradient(&self, dy: MatRef<'_, Self>, dbias: Option<MatRef<'_, Self, f32>>) -> Result<()> {
        let Some(dbias) = dbias else { return Ok(()) };
        let ones = Matrix::splat(&self.one, 1, dy.rows());
        self.sum(Sum::new(matrix(dbias), ones * matrix(dy)))
    }

    /// `out = 0`
    pub(super) fn zero(&self, out: Matrix<'_>) -> Result<()> {
        self.sum(Sum { epilogue: Epilogue::Store(out), init: Init::Zero, scale: 1.0, update: None, base: None })
    }
}

/// The initial value of `y`: the bias in every row, the output's own value if `accumulate`, or both.
pub(super) fn bias_in_every_row<E: Float>(bias: Option<MatRef<'_, WebGpu<E>>>, rows: usize, accumulate: bool) -> Init<'_> {
    Init::new(bias.map(|bias| matrix(bias).repeated(rows)), accumulate)
}
