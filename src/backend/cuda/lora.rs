//! The verbs of the low-rank layer.

use super::device::{Arg, Device};
use super::hopper;
use super::linear::sizes;
use super::plan::{self, Bands, bands, pointwise, product, size};
use super::{Cuda, read, read_if, write};
use crate::element::Float;
use crate::error::Result;
use crate::op::{Dropout, LoraBackward, LoraForward, LoraMerge};
use crate::tensor::Shape;

/// `h = drop(x)·Aᵀ`, `y = x·Wᵀ + bias + scale·h·Bᵀ`: one launch, or two
pub(super) fn forward<E: Float, D: Device>(cuda: &Cuda<E, D>, op: LoraForward<'_, Cuda<E, D>>) -> Result<()> {
    let ([m, k, n], r) = (sizes(op.x, op.b)?, size(op.a.rows())?);
    let plan = plan::forward(E::DTYPE, [m, k, n], r, op.dropout.is_some())?;
    if let Some(to_h) = plan.h {
        let [key0, key1, threshold, keep_scale] = dropout(op.dropout);
        let (x, a, h) = (read(op.x), read(op.a), write(op.h));
        cuda.launch(to_h, vec![x, a, key0, key1, threshold, keep_scale, h, m.into(), k.into(), r.into()])?;
    }
    let (a, h) = if plan.h.is_none() { (read(op.a), write(op.h)) } else { (Arg::Null, read(op.h)) };
    let (to_y, [x, w, y]) = hopper::instead(cuda, plan.y, op.x, op.w, op.y)?;
    let operands = [x, w, read_if(op.bias)].into_iter().chain(plan.narrow.then_some(a));
    let rest = [read(op.b), h, op.scale.into(), y, m.into(), k.into(), n.into(), r.into()];
    cuda.launch(to_y, operands.chain(rest).collect())
}

/// `dh = scale·dy·B`, `dA = dhᵀ·drop(x)`, `dB = scale·dyᵀ·h`, `dbias = Σ dy`, `dx = dy·W + drop(dh·A)`: five launches at most
pub(super) fn backward<E: Float, D: Device>(cuda: &Cuda<E, D>, mut op: LoraBackward<'_, Cuda<E, D>>) -> Result<()> {
    let ([m, k, n], r) = (sizes(op.x, op.b)?, size(op.a.rows())?);
    let to_dx = product(E::DTYPE, "lora_backward_dx", [m, k], [n, k])?;
    let mut dh = cuda.scratch(op.x.rows(), op.a.rows())?.memory;
    from_dy(cuda, &mut op, &mut dh, [m, n, r])?;
    from_x(cuda, &mut op, &dh, [m, k, r])?;

    let Some(dx) = op.dx else { return Ok(()) };
    let [key0, key1, threshold, keep_scale] = dropout(op.dropout);
    let (to_dx, [dy, w, dx]) = hopper::instead(cuda, to_dx, op.dy, op.w, dx)?;
    let (a, dh) = (read(op.a), Arg::Read(&dh));
    let dims = [m, k, n, r].map(Arg::U32);
    cuda.launch(to_dx, [w, a, dy, dh, key0, key1, threshold, keep_scale, dx].into_iter().chain(dims).collect())
}

/// `dh = scale·dy·B`, `dB = scale·dyᵀ·h`, `dbias = Σ dy`, from one reading of `dy`
fn from_dy<E: Float, D: Device>(
    cuda: &Cuda<E, D>,
    op: &mut LoraBackward<'_, Cuda<E, D>>,
    dh: &mut D::Memory,
    [m, n, r]: [u32; 3],
) -> Result<()> {
    let Bands { plan, bands, shares, rows_a_share } = bands("lora_backward_dy", [m, n], r)?;
    let mut dh = Parts::new(cuda, dh, [m, r], bands)?;
    let mut db = Parts::new(cuda, &mut op.db.buffer_mut().memory, [n, r], shares)?;
    let mut dbias = match &mut op.dbias {
        Some(dbias) => Some(Parts::new(cuda, &mut dbias.buffer_mut().memory, [1, n], shares)?),
        None => None,
    };
    let outputs = [dh.arg(), db.arg(), dbias.as_mut().map_or(Arg::Null, Parts::arg)];
    let operands = [read(op.b), read(op.h), read(op.dy), op.scale.into()].into_iter().chain(outputs);
    cuda.launch(plan, operands.chain([m, n, r, rows_a_share].map(Arg::U32)).collect())?;
    add_parts(cuda, [Some(dh), Some(db), dbias])
}

/// `dA = dhᵀ·drop(x)`
fn from_x<E: Float, D: Device>(
    cuda: &Cuda<E, D>,
    op: &mut LoraBackward<'_, Cuda<E, D>>,
    dh: &D::Memory,
    [m, k, r]: [u32; 3],
) -> Result<()> {
    let Bands { plan, shares, rows_a_share, .. } = bands("lora_backward_da", [m, k], r)?;
    let mut da = Parts::new(cuda, &mut op.da.buffer_mut().memory, [r, k], shares)?;
    let [key0, key1, threshold, keep_scale] = dropout(op.dropout);
    let operands = [read(op.x), Arg::Read(dh), key0, key1, threshold, keep_scale, da.arg()].into_iter();
    cuda.launch(plan, operands.chain([m, k, r, rows_a_share].map(Arg::U32)).collect())?;
    add_parts(cuda, [Some(da), None, None])
}

/// An output that several blocks add to. One part is the output itself; more lie in scratch memory until they are added.
struct Parts<'o, M> {
    to: &'o mut M,
    parts: Option<M>,
    len: u64,
    count: u32,
}

impl<'o, M> Parts<'o, M> {
    fn new<E: Float, D: Device<Memory = M>>(
        cuda: &Cuda<E, D>,
        to: &'o mut M,
        [rows, cols]: [u32; 2],
        count: u32,
    ) -> Result<Self> {
        let parts = match count {
            1 => None,
            _ => Some(cuda.scratch(count as usize * rows as usize, cols as usize)?.memory),
        };
        Ok(Self { to, parts, len: u64::from(rows) * u64::from(cols), count })
    }

    /// Where the blocks write.
    fn arg(&mut self) -> Arg<'_, M> {
        Arg::Write(self.parts.as_mut().unwrap_or(self.to))
    }
}

/// Adds up what lies in parts, if anything does, in one launch.
fn add_parts<E: Float, D: Device>(cuda: &Cuda<E, D>, outputs: [Option<Parts<'_, D::Memory>>; 3]) -> Result<()> {
    let outputs = outputs.map(|output| output.filter(|output| output.parts.is_some()));
    let len = outputs.iter().flatten().map(|output| output.len).sum::<u64>();
    let plan = pointwise("lora_backward_sum", Shape { rows: len as usize, cols: 1 })?;
    let lens = outputs.each_ref().map(|output| Arg::U64(output.as_ref().map_or(0, |output| output.len)));
    let counts = outputs.each_ref().map(|output| Arg::U32(output.as_ref().map_or(0, |output| output.count)));
    let (mut parts, mut to) = ([const { None }; 3], [const { None }; 3]);
    for (i, output) in outputs.into_iter().enumerate() {
        (parts[i], to[i]) = output.map_or((None, None), |output| (output.parts, Some(output.to)));
    }
    let parts = parts.each_ref().map(|parts| parts.as_ref().map_or(Arg::Null, Arg::Read));
    let to = to.map(|to| to.map_or(Arg::Null, Arg::Write));
    cuda.launch(plan, parts.into_iter().chain(to).chain(lens).chain(counts).collect())
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
