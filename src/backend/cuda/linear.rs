//! The verbs of the base layer.

use super::Cuda;
use super::device::{Arg, Device};
use super::lora::dropout;
use super::operand::{Matrix, MatrixMut, has_pairs, read_if, write};
use super::plan::{self, Aligned, WARP, product, shares};
use super::products::{ToDx, ToY};
use crate::element::Float;
use crate::error::Result;
use crate::op::{LinearBackward, LinearForward};
use crate::view::MatMut;

/// `y = x·Wᵀ + bias`: a layer whose update has rank 0
pub(super) fn forward<E: Float, D: Device>(cuda: &Cuda<E, D>, op: LinearForward<'_, Cuda<E, D>>) -> Result<()> {
    const VERB: &str = "linear_forward";
    let (x, w) = (Matrix::new(VERB, "x", op.x)?, Matrix::new(VERB, "w", op.w.dense(VERB)?)?);
    let (y, adds) = op.y.into_parts();
    let y = MatrixMut::new(VERB, "y", y)?;
    let aligned = Aligned { x: x.aligned, w: w.aligned, a: true };
    let plan = plan::forward(cuda.device.gpu(), E::DTYPE, [x.rows, x.cols, w.rows], 0, false, aligned)?;
    let (bias, bias_has_pairs) = (read_if(op.bias), op.bias.is_none_or(has_pairs));
    let (a, b, h, scale, rank) = (None, None, Arg::Null, 1.0, 0);
    ToY { x, w: Some(w), bias, bias_has_pairs, a, b, h, scale, y, adds, rank }.launch(&mut cuda.chain(), plan)
}

/// `dx = dy·W`, `dW = dyᵀ·x`, `dbias = Σ dy`
pub(super) fn backward<E: Float, D: Device>(cuda: &Cuda<E, D>, op: LinearBackward<'_, Cuda<E, D>>) -> Result<()> {
    const VERB: &str = "linear_backward";
    let (gpu, dy) = (cuda.device.gpu(), Matrix::new(VERB, "dy", op.dy)?);
    let x = op.x.map(|x| Matrix::new(VERB, "x", x)).transpose()?;
    let w = op.w.map(|w| w.dense(VERB).and_then(|w| Matrix::new(VERB, "w", w))).transpose()?;
    if let (Some(dx), Some(w)) = (op.dx, w) {
        let (dx, adds) = dx.into_parts();
        let dx = MatrixMut::new(VERB, "dx", dx)?;
        let plan = plan::backward_dx(gpu, E::DTYPE, [dy.rows, w.cols, dy.cols], dy.aligned && w.aligned)?;
        let (a, dh, dropout, rank) = (None, Arg::Null, dropout(None), 0);
        ToDx { w: Some(w), a, dy, dh, dropout, dx, adds, rank }.launch(&mut cuda.chain(), plan)?;
    }
    if let (Some(dw), Some(x)) = (op.dw, x) {
        let (m, k, n) = (dy.rows, x.cols, dy.cols);
        let plan = product(gpu, E::DTYPE, "linear_backward_dw", [n, k], [n, k], x.aligned && dy.aligned)?;
        let sizes = [m, k, n, x.stride, dy.stride].map(Arg::U32);
        cuda.launch(plan, [x.read(), dy.read(), write(dw)].into_iter().chain(sizes).collect())?;
    }
    dbias(cuda, dy, op.dbias)
}

/// `dbias = Σ dy` over the rows
pub(super) fn dbias<E: Float, D: Device>(
    cuda: &Cuda<E, D>,
    dy: Matrix<'_, D::Memory>,
    dbias: Option<MatMut<'_, Cuda<E, D>, f32>>,
) -> Result<()> {
    let Some(dbias) = dbias else { return Ok(()) };
    let plan = shares("linear_backward_dbias", dy.cols, WARP);
    cuda.launch(plan, vec![dy.read(), write(dbias), dy.rows.into(), dy.cols.into(), dy.stride.into()])
}
