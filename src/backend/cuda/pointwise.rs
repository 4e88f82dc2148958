//! The verbs that pass over memory once.

use super::Cuda;
use super::device::{Arg, Device};
use super::kernel::{self, Elementwise, Kernel, Mask};
use super::operand::{read, write};
use super::plan::{self, THREADS, WARP, blocks_for, size, tiles};
use crate::element::Float;
use crate::error::Result;
use crate::op::{Accumulate, Adam, Add, CrossEntropy, DropoutForward, Relu, ReluBackward, WeightGrad};
use crate::tensor::Shape;

/// `y = max(x, 0)`
pub(super) fn relu<E: Float, D: Device>(cuda: &Cuda<E, D>, op: Relu<'_, Cuda<E, D>>) -> Result<()> {
    let shape = op.x.shape();
    let params = Elementwise { x: read(op.x), y: write(op.y), len: len(shape)? };
    cuda.launch(plan::pointwise(Kernel::Relu, shape)?, params)
}

/// `dx = dy` where `y > 0`, else 0
pub(super) fn relu_backward<E: Float, D: Device>(cuda: &Cuda<E, D>, op: ReluBackward<'_, Cuda<E, D>>) -> Result<()> {
    let shape = op.y.shape();
    let params = kernel::ReluBackward { y: read(op.y), dy: read(op.dy), dx: write(op.dx), len: len(shape)? };
    cuda.launch(plan::pointwise(Kernel::ReluBackward, shape)?, params)
}

/// `y += x`
pub(super) fn add<E: Float, D: Device>(cuda: &Cuda<E, D>, op: Add<'_, Cuda<E, D>>) -> Result<()> {
    let shape = op.x.shape();
    let params = Elementwise { x: read(op.x), y: write(op.y), len: len(shape)? };
    cuda.launch(plan::pointwise(Kernel::Add, shape)?, params)
}

/// `y += scale·x`, in `f32`
pub(super) fn accumulate<E: Float, D: Device>(cuda: &Cuda<E, D>, op: Accumulate<'_, Cuda<E, D>>) -> Result<()> {
    let shape = op.x.shape();
    let params = kernel::Accumulate { x: read(op.x), scale: op.scale, y: write(op.y), len: len(shape)? };
    cuda.launch(plan::pointwise(Kernel::Accumulate, shape)?, params)
}

/// `y = drop(x)`
pub(super) fn dropout_forward<E: Float, D: Device>(cuda: &Cuda<E, D>, op: DropoutForward<'_, Cuda<E, D>>) -> Result<()> {
    let shape = op.x.shape();
    let (mask, len) = (Mask(Some(op.dropout)), len(shape)?);
    let params = kernel::DropoutForward { x: read(op.x), mask, y: write(op.y), len };
    cuda.launch(plan::pointwise(Kernel::DropoutForward, shape)?, params)
}

/// `loss = mean(-log softmax(logits)[label])`, `dlogits = (softmax(logits) - onehot(label)) / counted`, over the rows with a label
pub(super) fn cross_entropy<E: Float, D: Device>(cuda: &Cuda<E, D>, op: CrossEntropy<'_, Cuda<E, D>>) -> Result<()> {
    let (m, n, counted) = (size(op.logits.rows())?, size(op.logits.cols())?, size(op.labels.counted())?);
    let mut losses = cuda.scratch(op.logits.rows(), 1)?.memory;
    let (logits, labels, dlogits) = (read(op.logits), read(op.labels.tensor().view()), write(op.dlogits));
    let rows = kernel::CrossEntropyRows { logits, labels, losses: Arg::Write(&mut losses, 0), dlogits, m, n, counted };
    cuda.launch(blocks_for(Kernel::CrossEntropyRows, m, THREADS / WARP), rows)?;
    let mean = kernel::CrossEntropyMean { losses: Arg::Read(&losses, 0), loss: write(op.loss), m, counted };
    cuda.launch(blocks_for(Kernel::CrossEntropyMean, 1, 1), mean)
}

/// `m = β₁·m + (1-β₁)·g`, `v = β₂·v + (1-β₂)·g²`, `w = decay·w - step_size·m / (√v·root_scale + eps)`
pub(super) fn adam<E: Float, D: Device>(cuda: &Cuda<E, D>, op: Adam<'_, Cuda<E, D>>) -> Result<()> {
    let (shape, rate) = (op.w.shape(), op.rate);
    let master = op.master.map_or(Arg::Null, |master| write(master.view_mut()));
    let (m, v, w) = (write(op.m.view_mut()), write(op.v.view_mut()), write(op.w.view_mut()));
    match op.grad {
        WeightGrad::Dense(grad) => {
            let params = kernel::AdamDense { g: read(grad.view()), rate, m, v, master, w, len: len(shape)? };
            cuda.launch(plan::pointwise(Kernel::AdamDense, shape)?, params)
        }
        WeightGrad::Factored { dy, x } => {
            let (batch, n, k) = (size(x.rows())?, size(shape.rows)?, size(shape.cols)?);
            let (x, dy) = (read(x.view()), read(dy.view()));
            let params = kernel::AdamFactored { x, dy, rate, m, v, master, w, batch, k, n };
            cuda.launch(tiles(Kernel::AdamFactored, n, k)?, params)
        }
    }
}

/// The number of elements, as a kernel parameter.
fn len(shape: Shape) -> Result<u64> {
    Ok(shape.elements()? as u64)
}
