//! The verbs of the low-rank layer.

use super::device::{Arg, Device};
use super::hopper;
use super::linear::{dbias, sizes};
use super::plan::{product, size, tiles};
use super::{Cuda, memory, memory_mut, read, read_if, write};
use crate::element::Float;
use crate::error::Result;
use crate::op::{Dropout, LoraBackward, LoraForward, LoraMerge};

/// `h = drop(x)·Aᵀ`, `y = x·Wᵀ + bias + scale·h·Bᵀ`
pub(super) fn forward<E: Float, D: Device>(cuda: &Cuda<E, D>, op: LoraForward<'_, Cuda<E, D>>) -> Result<()> {
    let ([m, k, n], r) = (sizes(op.x, op.b)?, size(op.a.rows())?);
    let to_h = tiles("lora_forward_h", m, r)?;
    let to_y = product(E::DTYPE, "lora_forward_y", [m, n], [k, k])?;
    let [key0, key1, threshold, keep_scale] = dropout(op.dropout);
    let (x, a, h) = (read(op.x), read(op.a), write(op.h));
    cuda.launch(to_h, vec![x, a, key0, key1, threshold, keep_scale, h, m.into(), k.into(), r.into()])?;

    let (bias, b, h, scale) = (read_if(op.bias), read(op.b), read(op.h), op.scale.into());
    let dims = [m, k, n, r].map(Arg::U32);
    if let (Some(w), Some(to_y)) = (op.w, hopper::product(cuda.device.gpu(), E::DTYPE, "lora_forward_y", [m, n], k)) {
        let (x, w, y) = (to_y.lhs(memory(op.x), m, k), to_y.rhs(memory(w), n, k), to_y.out(memory_mut(op.y), m, n));
        return cuda.launch(to_y.plan, [x, w, bias, b, h, scale, y].into_iter().chain(dims).collect());
    }
    let (x, w, y) = (read(op.x), read_if(op.w), write(op.y));
    cuda.launch(to_y, [x, w, bias, b, h, scale, y].into_iter().chain(dims).collect())
}

/// `dh = scale·dy·B`, `dA = dhᵀ·drop(x)`, `dB = scale·dyᵀ·h`, `dbias = Σ dy`, `dx = dy·W + drop(dh·A)`
pub(super) fn backward<E: Float, D: Device>(cuda: &Cuda<E, D>, op: LoraBackward<'_, Cuda<E, D>>) -> Result<()> {
    let ([m, k, n], r) = (sizes(op.x, op.b)?, size(op.a.rows())?);
    let (to_dh, to_da) = (tiles("lora_backward_dh", m, r)?, tiles("lora_backward_da", r, k)?);
    let to_db = tiles("lora_backward_db", n, r)?;
    let to_dx = product(E::DTYPE, "lora_backward_dx", [m, k], [n, k])?;
    let mut dh = cuda.scratch(op.x.rows(), op.a.rows())?;

    let (b, dy, scale) = (read(op.b), read(op.dy), op.scale.into());
    cuda.launch(to_dh, vec![b, dy, scale, Arg::Write(&mut dh.memory), m.into(), n.into(), r.into()])?;
    let dh = &dh.memory;

    let [key0, key1, threshold, keep_scale] = dropout(op.dropout);
    let (x, da) = (read(op.x), write(op.da));
    cuda.launch(to_da, vec![x, Arg::Read(dh), key0, key1, threshold, keep_scale, da, m.into(), k.into(), r.into()])?;

    let (h, dy, scale, db) = (read(op.h), read(op.dy), op.scale.into(), write(op.db));
    cuda.launch(to_db, vec![h, dy, scale, db, m.into(), n.into(), r.into()])?;
    dbias(cuda, op.dy, op.dbias)?;

    let Some(dx) = op.dx else { return Ok(()) };
    let [key0, key1, threshold, keep_scale] = dropout(op.dropout);
    let (a, dh, dims) = (read(op.a), Arg::Read(dh), [m, k, n, r].map(Arg::U32));
    if let (Some(w), Some(to_dx)) = (op.w, hopper::product(cuda.device.gpu(), E::DTYPE, "lora_backward_dx", [m, k], n)) {
        let (w, dy, dx) = (to_dx.rhs(memory(w), n, k), to_dx.lhs(memory(op.dy), m, n), to_dx.out(memory_mut(dx), m, k));
        let args = [w, a, dy, dh, key0, key1, threshold, keep_scale, dx];
        return cuda.launch(to_dx.plan, args.into_iter().chain(dims).collect());
    }
    let (w, dy, dx) = (read_if(op.w), read(op.dy), write(dx));
    cuda.launch(to_dx, [w, a, dy, dh, key0, key1, threshold, keep_scale, dx].into_iter().chain(dims).collect())
}

/// `W += scale·B·A`
pub(super) fn merge<E: Float, D: Device>(cuda: &Cuda<E, D>, op: LoraMerge<'_, Cuda<E, D>>) -> Result<()> {
    let (n, k, r) = (size(op.w.rows())?, size(op.w.cols())?, size(op.a.rows())?);
    let (a, b, scale, w) = (read(op.a), read(op.b), op.scale.into(), write(op.w));
    let dims = [n, k, r].map(Arg::U32);
    match op.rounding.key(E::DTYPE) {
        None => cuda.launch(tiles("lora_merge", n, k)?, [a, b, scale, w].into_iter().chain(dims).collect()),
        Some(key) => {
            let ([key0, key1], plan) = (key.map(Arg::U32), tiles("lora_merge_by_chance", n, k)?);
            cuda.launch(plan, [a, b, scale, key0, key1, w].into_iter().chain(dims).collect())
        }
    }
}

/// The mask as kernels take it; without dropout nothing is below the threshold, and all is kept as it is.
pub(super) fn dropout<'a, M>(dropout: Option<Dropout>) -> [Arg<'a, M>; 4] {
    let ([key0, key1], threshold, keep_scale) =
        dropout.map_or(([0, 0], 0, 1.0), |dropout| (dropout.key(), dropout.threshold(), dropout.keep_scale()));
    [key0.into(), key1.into(), threshold.into(), keep_scale.into()]
}
