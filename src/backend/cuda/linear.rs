//! The verbs of the base layer.

use super::device::{Arg, Device};
use super::hopper;
use super::plan::{WARP, product, shares, size};
use super::{Cuda, memory, memory_mut, read, read_if, write};
use crate::element::Float;
use crate::error::Result;
use crate::op::{LinearBackward, LinearForward};
use crate::tensor::Tensor;

/// `y = x·Wᵀ + bias`
pub(super) fn forward<E: Float, D: Device>(cuda: &Cuda<E, D>, op: LinearForward<'_, Cuda<E, D>>) -> Result<()> {
    let [m, k, n] = sizes(op.x, op.w)?;
    if let Some(to_y) = hopper::product(cuda.device.gpu(), E::DTYPE, "linear_forward", [m, n], k) {
        let (x, w, y) = (to_y.lhs(memory(op.x), m, k), to_y.rhs(memory(op.w), n, k), to_y.out(memory_mut(op.y), m, n));
        return cuda.launch(to_y.plan, vec![x, w, read_if(op.bias), y, m.into(), k.into(), n.into()]);
    }
    let args = vec![read(op.x), read(op.w), read_if(op.bias), write(op.y), m.into(), k.into(), n.into()];
    cuda.launch(product(E::DTYPE, "linear_forward", [m, n], [k, k])?, args)
}

/// `dx = dy·W`, `dW = dyᵀ·x`, `dbias = Σ dy`
pub(super) fn backward<E: Float, D: Device>(cuda: &Cuda<E, D>, op: LinearBackward<'_, Cuda<E, D>>) -> Result<()> {
    let [m, k, n] = sizes(op.x, op.w)?;
    let dims = || [m, k, n].map(Arg::U32);
    if let Some(dx) = op.dx {
        let (operands, plan) = match hopper::product(cuda.device.gpu(), E::DTYPE, "linear_backward_dx", [m, k], n) {
            Some(to_dx) => {
                let (w, dy) = (to_dx.rhs(memory(op.w), n, k), to_dx.lhs(memory(op.dy), m, n));
                ([w, dy, to_dx.out(memory_mut(dx), m, k)], to_dx.plan)
            }
            None => ([read(op.w), read(op.dy), write(dx)], product(E::DTYPE, "linear_backward_dx", [m, k], [n, k])?),
        };
        cuda.launch(plan, operands.into_iter().chain(dims()).collect())?;
    }
    if let Some(dw) = op.dw {
        let operands = [read(op.x), read(op.dy), write(dw)];
        let plan = product(E::DTYPE, "linear_backward_dw", [n, k], [n, k])?;
        cuda.launch(plan, operands.into_iter().chain(dims()).collect())?;
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
