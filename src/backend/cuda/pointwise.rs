//! The verbs that pass over memory once.

use super::Cuda;
use super::device::{Arg, Device};
use super::lora::dropout;
use super::operand::{read, write};
use super::plan::{self, THREADS, WARP, blocks_for, size, tiles};
use crate::element::Float;
use crate::error::Result;
use crate::op::{Accumulate, Adam, AdamRate, Add, CrossEntropy, DropoutForward, Relu, ReluBackward, WeightGrad};
use crate::tensor::Shape;

/// `y = max(x, 0)`
pub(super) fn relu<E: Float, D: Device>(cuda: &Cuda<E, D>, op: Relu<'_, Cuda<E, D>>) -> Result<()> {
    let shape = op.x.shape();
    cuda.launch(plan::pointwise("relu", shape)?, vec![read(op.x), write(op.y), len(shape)?])
}

/// `dx = dy` where `y > 0`, else 0
pub(super) fn relu_backward<E: Float, D: Device>(cuda: &Cuda<E, D>, op: ReluBackward<'_, Cuda<E, D>>) -> Result<()> {
    let shape = op.y.shape();
    cuda.launch(plan::pointwise("relu_backward", shape)?, vec![read(op.y), read(op.dy), write(op.dx), len(shape)?])
}

/// `y += x`
pub(super) fn add<E: Float, D: Device>(cuda: &Cuda<E, D>, op: Add<'_, Cuda<E, D>>) -> Result<()> {
    let shape = op.x.shape();
    cuda.launch(plan::pointwise("add", shape)?, vec![read(op.x), write(op.y), len(shape)?])
}

/// `y += scale·x`, in `f32`
pub(super) fn accumulate<E: Float, D: Device>(cuda: &Cuda<E, D>, op: Accumulate<'_, Cuda<E, D>>) -> Result<()> {
    let shape = op.x.shape();
    let args = vec![read(op.x), op.scale.into(), write(op.y), len(shape)?];
    cuda.launch(plan::pointwise("accumulate", shape)?, args)
}

/// `y = drop(x)`
pub(super) fn dropout_forward<E: Float, D: Device>(cuda: &Cuda<E, D>, op: DropoutForward<'_, Cuda<E, D>>) -> Result<()> {
    let shape = op.x.shape();
    let [key0, key1, threshold, keep_scale] = dropout(Some(op.dropout));
    let args = vec![read(op.x), key0, key1, threshold, keep_scale, write(op.y), len(shape)?];
    cuda.launch(plan::pointwise("dropout_forward", shape)?, args)
}

/// `loss = mean(-log softmax(logits)[label])`, `dlogits = (softmax(logits) - onehot(label)) / counted`, over the rows with a label
pub(super) fn cross_entropy<E: Float, D: Device>(cuda: &Cuda<E, D>, op: CrossEntropy<'_, Cuda<E, D>>) -> Result<()> {
    let (m, n) = (size(op.logits.rows())?, size(op.logits.cols())?);
    let mut losses = cuda.scratch(op.logits.rows(), 1)?;
    let (logits, labels, dlogits) = (read(op.logits), read(op.labels.tensor().view()), write(op.dlogits));
    let counted = size(op.labels.counted())?;
    let rows = blocks_for("cross_entropy_rows", m, THREADS / WARP);
    cuda.launch(rows, vec![logits, labels, Arg::Write(&mut losses.memory, 0), dlogits, m.into(), n.into(), counted.into()])?;
    cuda.launch(
        blocks_for("cross_entropy_mean", 1, 1),
        vec![Arg::Read(&losses.memory, 0), write(op.loss), m.into(), counted.into()],
    )
}

/// `m = β₁·m + (1-β₁)·g`, `v = β₂·v + (1-β₂)·g²`, `w = decay·w - step_size·m / (√v·root_scale + eps)`
pub(super) fn adam<E: Float, D: Device>(cuda: &Cuda<E, D>, op: Adam<'_, Cuda<E, D>>) -> Result<()> {
    let shape = op.w.shape();
    let AdamRate { beta1, beta2, step_size, root_scale, eps, decay } = op.rate;
    let rate = [beta1, beta2, step_size, root_scale, eps, decay].map(Arg::F32);
    let master = op.master.map_or(Arg::Null, |master| write(master.view_mut()));
    let state = [write(op.m.view_mut()), write(op.v.view_mut()), master, write(op.w.view_mut())];
    match op.grad {
        WeightGrad::Dense(grad) => {
            let args = std::iter::once(read(grad.view())).chain(rate).chain(state).chain([len(shape)?]);
            cuda.launch(plan::pointwise("adam_dense", shape)?, args.collect())
        }
        WeightGrad::Factored { dy, x } => {
            let (batch, n, k) = (size(x.rows())?, size(shape.rows)?, size(shape.cols)?);
            let args = [read(x.view()), read(dy.view())].into_iter().chain(rate).chain(state).chain([batch, k, n].map(Arg::U32));
            cuda.launch(tiles("adam_factored", n, k)?, args.collect())
        }
    }
}

/// The number of elements, as a kernel argument.
fn len<'a, M>(shape: Shape) -> Result<Arg<'a, M>> {
    Ok((shape.elements()? as u64).into())
}
