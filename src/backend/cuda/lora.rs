//! The verbs of the low-rank layer.

use super::device::{Arg, Device};
use super::kernel::{self, Kernel, Mask, StochasticKey};
use super::operand::{Matrix, MatrixMut, factor, has_aligned_pairs, read, read_if, stored_factor, write};
use super::plan::{self, Aligned, bands, pointwise};
use super::products::{BackwardDx, ForwardY};
use super::{Chain, Cuda};
use crate::element::Float;
use crate::error::Result;
use crate::op::{LoraBackward, LoraForward, LoraMerge};
use crate::tensor::Shape;

/// `h = drop(x)·Aᵀ`, `y = x·Wᵀ + bias + scale·h·Bᵀ`: one launch, or two that overlap, after one for each factor that is rounded
pub(super) fn forward<E: Float, D: Device>(cuda: &Cuda<E, D>, op: LoraForward<'_, Cuda<E, D>>) -> Result<()> {
    const VERB: &str = "lora_forward";
    let (mut rounded_a, mut rounded_b) = (None, None);
    let x = Matrix::new(VERB, "x", op.x)?;
    let w = op.w.map(|w| Matrix::new(VERB, "w", w.dense())).transpose()?;
    let (y, accumulate) = op.y.into_parts();
    let y = MatrixMut::new(VERB, "y", y)?;
    let a = factor(cuda, VERB, "a", op.a, &mut rounded_a)?;
    let b = factor(cuda, VERB, "b", op.b, &mut rounded_b)?;
    let (rank, aligned) = (a.rows, Aligned { x: x.aligned, w: w.is_none_or(|w| w.aligned), a: a.aligned });
    let sizes = [x.rows, x.cols, y.cols];
    let plan = plan::forward(cuda.device.gpu(), E::DTYPE, sizes, rank, op.dropout.is_some(), aligned)?;
    let (mut chain, mut h) = (cuda.chain(), write(op.h));
    if let Some(h_plan) = plan.h {
        let (m, k, x_stride, a_stride) = (x.rows, x.cols, x.stride, a.stride);
        let (x, a, mask, h) = (x.read(), a.read(), Mask(op.dropout), h.reborrow());
        chain.launch(h_plan, kernel::LoraForwardH { x, a, mask, h, m, k, r: rank, x_stride, a_stride })?;
    }
    let (a, h) = if plan.h.is_none() { (Some(a), h.reborrow()) } else { (None, h.as_read()) };
    let (bias, bias_has_aligned_pairs) = (read_if(op.bias), op.bias.is_none_or(has_aligned_pairs));
    ForwardY { x, w, bias, bias_has_aligned_pairs, a, b: Some(b), h, scale: op.scale, y, accumulate, rank }
        .launch(&mut chain, plan)
}

/// `dh = scale·dy·B`, `dA = dhᵀ·drop(x)`, `dB = scale·dyᵀ·h`, `dbias = Σ dy`, `dx = dy·W + drop(dh·A)`: at most five launches,
/// which overlap, after one for each factor that is rounded
pub(super) fn backward<E: Float, D: Device>(cuda: &Cuda<E, D>, op: LoraBackward<'_, Cuda<E, D>>) -> Result<()> {
    const VERB: &str = "lora_backward";
    let (x, dy) = (Matrix::new(VERB, "x", op.x)?, Matrix::new(VERB, "dy", op.dy)?);
    let w = op.w.map(|w| Matrix::new(VERB, "w", w.dense())).transpose()?;
    let dx = op.dx.map(|dx| dx.into_parts());
    let dx = dx.map(|(dx, accumulate)| Ok::<_, crate::Error>((MatrixMut::new(VERB, "dx", dx)?, accumulate))).transpose()?;
    let (mut rounded_a, mut rounded_b) = (None, None);
    let a = if dx.is_some() { Some(factor(cuda, VERB, "a", op.a, &mut rounded_a)?) } else { None }; // only dx reads it
    let b = factor(cuda, VERB, "b", op.b, &mut rounded_b)?;
    let (m, k, n, r) = (x.rows, x.cols, dy.cols, b.cols);
    let (dy_bands, x_bands) = (bands(Kernel::LoraBackwardDy, [m, n], r)?, bands(Kernel::LoraBackwardDa, [m, k], r)?);
    let aligned = dy.aligned && w.is_none_or(|w| w.aligned);
    let dx_plan = plan::backward_dx(cuda.device.gpu(), E::DTYPE, [m, k, n], aligned)?;
    let mut dh = cuda.scratch(op.x.rows(), op.a.rows())?.memory;
    let mut dh_parts = PartialSums::new(cuda, [m, r], dy_bands.bands)?;
    let mut db_parts = PartialSums::new(cuda, [n, r], dy_bands.shares)?;
    let mut dbias_parts = if op.dbias.is_some() { PartialSums::new(cuda, [1, n], dy_bands.shares)? } else { PartialSums::NONE };
    let mut da_parts = PartialSums::new(cuda, [r, k], x_bands.shares)?;
    let (mut dh, mut da, mut db) = (Arg::Write(&mut dh, 0), write(op.da), write(op.db));
    let mut dbias = op.dbias.map_or(Arg::Null, write);
    let mut chain = cuda.chain();

    // dh, dB and dbias, from one reading of dy
    let params = kernel::LoraBackwardDy {
        b: b.read(),
        h: read(op.h),
        dy: dy.read(),
        scale: op.scale,
        dh: dh_parts.or(&mut dh),
        db: db_parts.or(&mut db),
        dbias: dbias_parts.or(&mut dbias),
        m,
        n,
        r,
        rows_per_share: dy_bands.rows_per_share,
        b_stride: b.stride,
        dy_stride: dy.stride,
    };
    chain.launch(dy_bands.plan, params)?;
    add_partial_sums(&mut chain, [(&dh_parts, &mut dh), (&db_parts, &mut db), (&dbias_parts, &mut dbias)])?;

    // dA
    let params = kernel::LoraBackwardDa {
        x: x.read(),
        dh: dh.as_read(),
        mask: Mask(op.dropout),
        da: da_parts.or(&mut da),
        m,
        k,
        r,
        rows_per_share: x_bands.rows_per_share,
        x_stride: x.stride,
    };
    chain.launch(x_bands.plan, params)?;
    add_partial_sums(
        &mut chain,
        [(&da_parts, &mut da), (&PartialSums::NONE, &mut Arg::Null), (&PartialSums::NONE, &mut Arg::Null)],
    )?;

    let Some((dx, accumulate)) = dx else { return Ok(()) };
    let (dh, mask) = (dh.as_read(), Mask(op.dropout));
    BackwardDx { w, a, dy, dh, mask, dx, accumulate, rank: r }.launch(&mut chain, dx_plan)
}

/// Partial sums that several blocks make of one output. A single one is the output itself; several lie in scratch memory until
/// they are added.
struct PartialSums<M> {
    memory: Option<M>,
    len: u64,
    count: u32,
}

impl<M> PartialSums<M> {
    const NONE: Self = Self { memory: None, len: 0, count: 0 };

    fn new<E: Float, D: Device<Memory = M>>(cuda: &Cuda<E, D>, [rows, cols]: [u32; 2], count: u32) -> Result<Self> {
        if count == 1 {
            return Ok(Self::NONE);
        }
        let memory = cuda.scratch(count as usize * rows as usize, cols as usize)?.memory;
        Ok(Self { memory: Some(memory), len: u64::from(rows) * u64::from(cols), count })
    }

    /// Memory that the blocks write: the partial sums, or `output` if there is a single one.
    fn or<'a>(&'a mut self, output: &'a mut Arg<'_, M>) -> Arg<'a, M> {
        self.memory.as_mut().map_or_else(|| output.reborrow(), |memory| Arg::Write(memory, 0))
    }
}

/// Partial sums and their output.
type Output<'a, 'm, M> = (&'a PartialSums<M>, &'a mut Arg<'m, M>);

/// Adds the partial sums of three outputs in one launch, if there are any.
fn add_partial_sums<D: Device>(chain: &mut Chain<'_, D>, outputs: [Output<'_, '_, D::Memory>; 3]) -> Result<()> {
    let (len, count) = (outputs.each_ref().map(|(parts, _)| parts.len), outputs.each_ref().map(|(parts, _)| parts.count));
    let plan = pointwise(Kernel::LoraBackwardSum, Shape { rows: len.iter().sum::<u64>() as usize, cols: 1 })?;
    let parts = outputs.each_ref().map(|(parts, _)| parts.memory.as_ref().map_or(Arg::Null, |memory| Arg::Read(memory, 0)));
    let to = outputs.map(|(parts, to)| if parts.memory.is_some() { to.reborrow() } else { Arg::Null });
    chain.launch(plan, kernel::LoraBackwardSum { parts, to, len, count })
}

/// `W += scale·B·A`: one launch. `f32` factors are not rounded; they need the kernel for any shape.
pub(super) fn merge<E: Float, D: Device>(cuda: &Cuda<E, D>, op: LoraMerge<'_, Cuda<E, D>>) -> Result<()> {
    const VERB: &str = "lora_merge";
    let ((a, a_is_f32), (b, b_is_f32)) = (stored_factor(VERB, "a", op.a)?, stored_factor(VERB, "b", op.b)?);
    let w = MatrixMut::new(VERB, "w", op.w)?;
    let is_f32 = a_is_f32 || b_is_f32;
    let plan = plan::merge(E::DTYPE, w.rows, w.cols, w.aligned && a.aligned && !is_f32)?;
    let (n, k, r, scale, rounding) = (w.rows, w.cols, a.rows, op.scale, StochasticKey(op.rounding.key(E::DTYPE)));
    let (a_stride, b_stride, w_stride) = (a.stride, b.stride, w.stride);
    let (a, b, w) = (a.read(), b.read(), w.write());
    if plan.kernel == Kernel::LoraMergeWide {
        return cuda.launch(plan, kernel::LoraMergeWide { a, b, scale, rounding, w, n, k, r, a_stride, b_stride, w_stride });
    }
    let params = kernel::LoraMerge { a, b, scale, rounding, w, n, k, r, a_stride, b_stride, w_stride, a_is_f32, b_is_f32 };
    cuda.launch(plan, params)
}
