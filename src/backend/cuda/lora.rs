//! The verbs of the low-rank layer.

use super::device::{Arg, Device};
use super::hopper;
use super::linear::sizes;
use super::plan::{self, bands, pointwise, size};
use super::{Chain, Cuda, memory_mut, read, read_if, write};
use crate::element::Float;
use crate::error::Result;
use crate::op::{Dropout, LoraBackward, LoraForward, LoraMerge};
use crate::tensor::Shape;

/// `h = drop(x)·Aᵀ`, `y = x·Wᵀ + bias + scale·h·Bᵀ`: one launch, or two that overlap
pub(super) fn forward<E: Float, D: Device>(cuda: &Cuda<E, D>, op: LoraForward<'_, Cuda<E, D>>) -> Result<()> {
    let ([m, k, n], r) = (sizes(op.x, op.b)?, size(op.a.rows())?);
    let plan = plan::forward(cuda.device.gpu(), E::DTYPE, [m, k, n], r, op.dropout.is_some())?;
    let mut chain = cuda.chain();
    if let Some(to_h) = plan.h {
        let [key0, key1, threshold, keep_scale] = dropout(op.dropout);
        let (x, a, h) = (read(op.x), read(op.a), write(op.h));
        chain.launch(to_h, vec![x, a, key0, key1, threshold, keep_scale, h, m.into(), k.into(), r.into()])?;
    }
    let (a, h) = if plan.h.is_none() { (read(op.a), write(op.h)) } else { (Arg::Null, read(op.h)) };
    let (to_y, [x, w, y]) = hopper::instead(cuda, plan.y, op.x, op.w, op.y)?;
    let operands = [x, w, read_if(op.bias)].into_iter().chain(plan.narrow.then_some(a));
    let rest = [read(op.b), h, op.scale.into(), y, m.into(), k.into(), n.into(), r.into()];
    chain.launch(to_y, operands.chain(rest).collect())
}

/// `dh = scale·dy·B`, `dA = dhᵀ·drop(x)`, `dB = scale·dyᵀ·h`, `dbias = Σ dy`, `dx = dy·W + drop(dh·A)`: five launches at most,
/// which overlap
pub(super) fn backward<E: Float, D: Device>(cuda: &Cuda<E, D>, op: LoraBackward<'_, Cuda<E, D>>) -> Result<()> {
    let ([m, k, n], r) = (sizes(op.x, op.b)?, size(op.a.rows())?);
    let (from_dy, from_x) = (bands("lora_backward_dy", [m, n], r)?, bands("lora_backward_da", [m, k], r)?);
    let to_dx = plan::backward_dx(cuda.device.gpu(), E::DTYPE, [m, k, n])?;
    let mut dh = cuda.scratch(op.x.rows(), op.a.rows())?.memory;
    let mut of_dh = Parts::new(cuda, [m, r], from_dy.bands)?;
    let mut of_db = Parts::new(cuda, [n, r], from_dy.shares)?;
    let mut of_dbias = if op.dbias.is_some() { Parts::new(cuda, [1, n], from_dy.shares)? } else { Parts::NONE };
    let mut of_da = Parts::new(cuda, [r, k], from_x.shares)?;
    let (da, db, mut dbias) = (memory_mut(op.da), memory_mut(op.db), op.dbias.map(memory_mut));
    let mut chain = cuda.chain();

    // dh, dB and dbias from one reading of dy
    let outputs = [of_dh.or(&mut dh), of_db.or(db), dbias.as_deref_mut().map_or(Arg::Null, |dbias| of_dbias.or(dbias))];
    let operands = [read(op.b), read(op.h), read(op.dy), op.scale.into()].into_iter().chain(outputs);
    let dims = [m, n, r, from_dy.rows_a_share].map(Arg::U32);
    chain.launch(from_dy.plan, operands.chain(dims).collect())?;
    add_parts(&mut chain, [(&of_dh, Some(&mut dh)), (&of_db, Some(db)), (&of_dbias, dbias)])?;

    // dA
    let [key0, key1, threshold, keep_scale] = dropout(op.dropout);
    let operands = [read(op.x), Arg::Read(&dh), key0, key1, threshold, keep_scale, of_da.or(da)].into_iter();
    let dims = [m, k, r, from_x.rows_a_share].map(Arg::U32);
    chain.launch(from_x.plan, operands.chain(dims).collect())?;
    add_parts(&mut chain, [(&of_da, Some(da)), (&Parts::NONE, None), (&Parts::NONE, None)])?;

    let Some(dx) = op.dx else { return Ok(()) };
    let [key0, key1, threshold, keep_scale] = dropout(op.dropout);
    let (to_dx, [dy, w, dx]) = hopper::instead(cuda, to_dx, op.dy, op.w, dx)?;
    let (a, dh) = (read(op.a), Arg::Read(&dh));
    let dims = [m, k, n, r].map(Arg::U32);
    chain.launch(to_dx, [w, a, dy, dh, key0, key1, threshold, keep_scale, dx].into_iter().chain(dims).collect())
}

/// What several blocks add to one output. One part is the output itself; more lie in scratch memory until they are added.
struct Parts<M> {
    memory: Option<M>,
    len: u64,
    count: u32,
}

impl<M> Parts<M> {
    const NONE: Self = Self { memory: None, len: 0, count: 0 };

    fn new<E: Float, D: Device<Memory = M>>(cuda: &Cuda<E, D>, [rows, cols]: [u32; 2], count: u32) -> Result<Self> {
        if count == 1 {
            return Ok(Self::NONE);
        }
        let memory = cuda.scratch(count as usize * rows as usize, cols as usize)?.memory;
        Ok(Self { memory: Some(memory), len: u64::from(rows) * u64::from(cols), count })
    }

    /// Where the blocks write: here, or to the output.
    fn or<'a>(&'a mut self, output: &'a mut M) -> Arg<'a, M> {
        Arg::Write(self.memory.as_mut().unwrap_or(output))
    }
}

/// Parts and their output; None: it has none.
type Output<'a, M> = (&'a Parts<M>, Option<&'a mut M>);

/// Adds up what lies in parts, if anything does, in one launch.
fn add_parts<D: Device>(chain: &mut Chain<'_, D>, outputs: [Output<'_, D::Memory>; 3]) -> Result<()> {
    let (lens, counts) = (outputs.each_ref().map(|(parts, _)| parts.len), outputs.each_ref().map(|(parts, _)| parts.count));
    let plan = pointwise("lora_backward_sum", Shape { rows: lens.iter().sum::<u64>() as usize, cols: 1 })?;
    let parts = outputs.each_ref().map(|(parts, _)| parts.memory.as_ref().map_or(Arg::Null, Arg::Read));
    let to = outputs.map(|(parts, to)| to.filter(|_| parts.memory.is_some()).map_or(Arg::Null, Arg::Write));
    let sizes = lens.map(Arg::U64).into_iter().chain(counts.map(Arg::U32));
    chain.launch(plan, parts.into_iter().chain(to).chain(sizes).collect())
}

/// `W += scale·B·A`: one launch
pub(super) fn merge<E: Float, D: Device>(cuda: &Cuda<E, D>, op: LoraMerge<'_, Cuda<E, D>>) -> Result<()> {
    let (n, k, r) = (size(op.w.rows())?, size(op.w.cols())?, size(op.a.rows())?);
    let key = op.rounding.key(E::DTYPE);
    let [key0, key1] = key.unwrap_or_default();
    let chance = [u32::from(key.is_some()), key0, key1].map(Arg::U32);
    let operands = [read(op.a), read(op.b), op.scale.into()].into_iter().chain(chance).chain([write(op.w)]);
    cuda.launch(plan::merge(E::DTYPE, n, k)?, operands.chain([n, k, r].map(Arg::U32)).collect())
}

/// The mask as kernels take it; without dropout nothing is below the threshold, and all is kept as it is.
pub(super) fn dropout<'a, M>(dropout: Option<Dropout>) -> [Arg<'a, M>; 4] {
    let ([key0, key1], threshold, keep_scale) =
        dropout.map_or(([0, 0], 0, 1.0), |dropout| (dropout.key(), dropout.threshold(), dropout.keep_scale()));
    [key0.into(), key1.into(), threshold.into(), keep_scale.into()]
}
