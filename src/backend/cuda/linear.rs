//! The verbs of the base layer.

use super::device::{Arg, Device};
use super::hopper;
use super::lora::dropout;
use super::plan::{self, WARP, product, shares, size};
use super::{Cuda, read, read_if, write};
use crate::element::Float;
use crate::error::Result;
use crate::op::{LinearBackward, LinearForward};
use crate::tensor::Tensor;

/// `y = x·Wᵀ + bias`: a layer whose update has rank 0
pub(super) fn forward<E: Float, D: Device>(cuda: &Cuda<E, D>, op: LinearForward<'_, Cuda<E, D>>) -> Result<()> {
    let [m, k, n] = sizes(op.x, op.w)?;
    let plan = plan::forward(cuda.device.gpu(), E::DTYPE, [m, k, n], 0, false)?;
    let update = std::iter::repeat_with(|| Arg::Null).take(if plan.narrow { 3 } else { 2 });
    let (to_y, [x, w, y]) = hopper::instead(cuda, plan.y, op.x, Some(op.w), op.y)?;
    let rest = [Arg::F32(1.0), y, m.into(), k.into(), n.into(), Arg::U32(0)];
    cuda.launch(to_y, [x, w, read_if(op.bias)].into_iter().chain(update).chain(rest).collect())
}

/// `dx = dy·W`, `dW = dyᵀ·x`, `dbias = Σ dy`
pub(super) fn backward<E: Float, D: Device>(cuda: &Cuda<E, D>, op: LinearBackward<'_, Cuda<E, D>>) -> Result<()> {
    let [m, k, n] = sizes(op.x, op.w)?;
    if let Some(dx) = op.dx {
        let plan = plan::backward_dx(cuda.device.gpu(), E::DTYPE, [m, k, n])?;
        let (to_dx, [dy, w, dx]) = hopper::instead(cuda, plan, op.dy, Some(op.w), dx)?;
        let operands = [w, Arg::Null, dy, Arg::Null].into_iter().chain(dropout(None));
        cuda.launch(to_dx, operands.chain([dx]).chain([m, k, n, 0].map(Arg::U32)).collect())?;
    }
    if let Some(dw) = op.dw {
        let operands = [read(op.x), read(op.dy), write(dw)];
        let plan = product(cuda.device.gpu(), E::DTYPE, "linear_backward_dw", [n, k], [n, k])?;
        cuda.launch(plan, operands.into_iter().chain([m, k, n].map(Arg::U32)).collect())?;
    }
    dbias(cuda, op.dy, op.dbias)
}

/// `dbias = Σ dy` over the rows
pub(super) fn dbias<E: Float, D: Device>(
    cuda: &Cuda<E, D>,
    dy: &Tensor<Cuda<E, D>>,
    dbias: Option<&mut Tensor<Cuda<E, D>, f32>>,
) -> Result<()> {
    let Some(dbias) = dbias else { return Ok(()) };
    let (m, n) = (size(dy.rows())?, size(dy.cols())?);
    cuda.launch(shares("linear_backward_dbias", n, WARP), vec![read(dy), write(dbias), m.into(), n.into()])
}

/// Rows, inputs and outputs, as kernels take them: `x` is `m×k`, and `w`, or `B`, has `n` rows.
pub(super) fn sizes<E: Float, D: Device>(x: &Tensor<Cuda<E, D>>, w: &Tensor<Cuda<E, D>>) -> Result<[u32; 3]> {
    Ok([size(x.rows())?, size(x.cols())?, size(w.rows())?])
}
