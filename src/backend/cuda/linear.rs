//! The verbs of the base layer.

use super::Cuda;
use super::device::{Arg, Device};
use super::kernel::{self, Kernel, Mask};
use super::operand::{Matrix, MatrixMut, has_aligned_pairs, read_if, write};
use super::plan::{self, Aligned, WARP, blocks_for, product};
use super::products::{BackwardDx, ForwardY};
use crate::element::Float;
use crate::error::Result;
use crate::op::{LinearBackward, LinearForward};
use crate::view::MatMut;

/// `y = x·Wᵀ + bias`: a layer whose update has rank 0
pub(super) fn forward<E: Float, D: Device>(cuda: &Cuda<E, D>, op: LinearForward<'_, Cuda<E, D>>) -> Result<()> {
    const VERB: &str = "linear_forward";
    let (x, w) = (Matrix::new(VERB, "x", op.x)?, Matrix::new(VERB, "w", op.w.dense())?);
    let (y, accumulate) = op.y.into_parts();
    let y = MatrixMut::new(VERB, "y", y)?;
    let aligned = Aligned { x: x.aligned, w: w.aligned, a: true };
    let plan = plan::forward(cuda.device.gpu(), E::DTYPE, [x.rows, x.cols, w.rows], 0, false, aligned)?;
    let (bias, bias_has_aligned_pairs) = (read_if(op.bias), op.bias.is_none_or(has_aligned_pairs));
    let (a, b, h, scale, rank) = (None, None, Arg::Null, 1.0, 0);
    ForwardY { x, w: Some(w), bias, bias_has_aligned_pairs, a, b, h, scale, y, accumulate, rank }.launch(&mut cuda.chain(), plan)
}

/// `dx = dy·W`, `dW = dyᵀ·x`, `dbias = Σ dy`
pub(super) fn backward<E: Float, D: Device>(cuda: &Cuda<E, D>, op: LinearBackward<'_, Cuda<E, D>>) -> Result<()> {
    const VERB: &str = "linear_backward";
    let (gpu, dy) = (cuda.device.gpu(), Matrix::new(VERB, "dy", op.dy)?);
    let x = op.x.map(|x| Matrix::new(VERB, "x", x)).transpose()?;
    let w = op.w.map(|w| Matrix::new(VERB, "w", w.dense())).transpose()?;
    if let (Some(dx), Some(w)) = (op.dx, w) {
        let (dx, accumulate) = dx.into_parts();
        let dx = MatrixMut::new(VERB, "dx", dx)?;
        let plan = plan::backward_dx(gpu, E::DTYPE, [dy.rows, w.cols, dy.cols], dy.aligned && w.aligned)?;
        let (a, dh, mask, rank) = (None, Arg::Null, Mask(None), 0);
        BackwardDx { w: Some(w), a, dy, dh, mask, dx, accumulate, rank }.launch(&mut cuda.chain(), plan)?;
    }
    if let (Some(dw), Some(x)) = (op.dw, x) {
        let (m, k, n) = (dy.rows, x.cols, dy.cols);
        let plan = product(gpu, E::DTYPE, Kernel::LinearBackwardDw, [n, k], [n, k], x.aligned && dy.aligned)?;
        let (x_stride, dy_stride) = (x.stride, dy.stride);
        let (x, dy, dw) = (x.read(), dy.read(), write(dw));
        cuda.launch(plan, kernel::LinearBackwardDw { x, dy, dw, m, k, n, x_stride, dy_stride })?;
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
    let (m, n, dy_stride) = (dy.rows, dy.cols, dy.stride);
    let params = kernel::LinearBackwardDbias { dy: dy.read(), dbias: write(dbias), m, n, dy_stride };
    cuda.launch(blocks_for(Kernel::LinearBackwardDbias, n, WARP), params)
}
