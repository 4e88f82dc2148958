//! The verbs of the low-rank layer.

use super::device::{Arg, Device};
use super::operand::{Matrix, MatrixMut, factor, factor_as_it_is, has_pairs, read, read_if, write};
use super::plan::{self, Aligned, bands, pointwise};
use super::products::{ToDx, ToY};
use super::{Chain, Cuda};
use crate::element::Float;
use crate::error::Result;
use crate::op::{Dropout, LoraBackward, LoraForward, LoraMerge};
use crate::tensor::Shape;

/// `h = drop(x)·Aᵀ`, `y = x·Wᵀ + bias + scale·h·Bᵀ`: one launch, or two that overlap; before them one for each factor that is rounded
pub(super) fn forward<E: Float, D: Device>(cuda: &Cuda<E, D>, op: LoraForward<'_, Cuda<E, D>>) -> Result<()> {
    const VERB: &str = "lora_forward";
    let (mut rounded_a, mut rounded_b) = (None, None);
    let x = Matrix::new(VERB, "x", op.x)?;
    let w = op.w.map(|w| w.dense(VERB).and_then(|w| Matrix::new(VERB, "w", w))).transpose()?;
    let (y, adds) = op.y.into_parts();
    let y = MatrixMut::new(VERB, "y", y)?;
    let a = factor(cuda, VERB, "a", op.a, &mut rounded_a)?;
    let b = factor(cuda, VERB, "b", op.b, &mut rounded_b)?;
    let (rank, aligned) = (a.rows, Aligned { x: x.aligned, w: w.is_none_or(|w| w.aligned), a: a.aligned });
    let sizes = [x.rows, x.cols, y.cols];
    let plan = plan::forward(cuda.device.gpu(), E::DTYPE, sizes, rank, op.dropout.is_some(), aligned)?;
    let (mut chain, mut h) = (cuda.chain(), write(op.h));
    if let Some(to_h) = plan.h {
        let [key0, key1, threshold, keep_scale] = dropout(op.dropout);
        let sizes = [x.rows, x.cols, rank, x.stride, a.stride].map(Arg::U32);
        let operands = [x.read(), a.read(), key0, key1, threshold, keep_scale, h.again()];
        chain.launch(to_h, operands.into_iter().chain(sizes).collect())?;
    }
    let (a, h) = if plan.h.is_none() { (Some(a), h.again()) } else { (None, h.to_read()) };
    let (bias, bias_has_pairs) = (read_if(op.bias), op.bias.is_none_or(has_pairs));
    ToY { x, w, bias, bias_has_pairs, a, b: Some(b), h, scale: op.scale, y, adds, rank }.launch(&mut chain, plan)
}

/// `dh = scale·dy·B`, `dA = dhᵀ·drop(x)`, `dB = scale·dyᵀ·h`, `dbias = Σ dy`, `dx = dy·W + drop(dh·A)`: five launches at most,
/// which overlap; before them one for each factor that is rounded
pub(super) fn backward<E: Float, D: Device>(cuda: &Cuda<E, D>, op: LoraBackward<'_, Cuda<E, D>>) -> Result<()> {
    const VERB: &str = "lora_backward";
    let (x, dy) = (Matrix::new(VERB, "x", op.x)?, Matrix::new(VERB, "dy", op.dy)?);
    let w = op.w.map(|w| w.dense(VERB).and_then(|w| Matrix::new(VERB, "w", w))).transpose()?;
    let dx = op.dx.map(|dx| dx.into_parts());
    let dx = dx.map(|(dx, adds)| Ok::<_, crate::Error>((MatrixMut::new(VERB, "dx", dx)?, adds))).transpose()?;
    let (mut rounded_a, mut rounded_b) = (None, None);
    let a = if dx.is_some() { Some(factor(cuda, VERB, "a", op.a, &mut rounded_a)?) } else { None }; // only dx reads it
    let b = factor(cuda, VERB, "b", op.b, &mut rounded_b)?;
    let (m, k, n, r) = (x.rows, x.cols, dy.cols, b.cols);
    let (from_dy, from_x) = (bands("lora_backward_dy", [m, n], r)?, bands("lora_backward_da", [m, k], r)?);
    let aligned = dy.aligned && w.is_none_or(|w| w.aligned);
    let to_dx = plan::backward_dx(cuda.device.gpu(), E::DTYPE, [m, k, n], aligned)?;
    let mut dh = cuda.scratch(op.x.rows(), op.a.rows())?.memory;
    let mut of_dh = Parts::new(cuda, [m, r], from_dy.bands)?;
    let mut of_db = Parts::new(cuda, [n, r], from_dy.shares)?;
    let mut of_dbias = if op.dbias.is_some() { Parts::new(cuda, [1, n], from_dy.shares)? } else { Parts::NONE };
    let mut of_da = Parts::new(cuda, [r, k], from_x.shares)?;
    let (mut dh, mut da, mut db) = (Arg::Write(&mut dh, 0), write(op.da), write(op.db));
    let mut dbias = op.dbias.map_or(Arg::Null, write);
    let mut chain = cuda.chain();

    // dh, dB and dbias from one reading of dy
    let outputs = [of_dh.or(&mut dh), of_db.or(&mut db), of_dbias.or(&mut dbias)];
    let operands = [b.read(), read(op.h), dy.read(), op.scale.into()].into_iter().chain(outputs);
    let dims = [m, n, r, from_dy.rows_a_share, b.stride, dy.stride].map(Arg::U32);
    chain.launch(from_dy.plan, operands.chain(dims).collect())?;
    add_parts(&mut chain, [(&of_dh, &mut dh), (&of_db, &mut db), (&of_dbias, &mut dbias)])?;

    // dA
    let [key0, key1, threshold, keep_scale] = dropout(op.dropout);
    let operands = [x.read(), dh.to_read(), key0, key1, threshold, keep_scale, of_da.or(&mut da)].into_iter();
    let dims = [m, k, r, from_x.rows_a_share, x.stride].map(Arg::U32);
    chain.launch(from_x.plan, operands.chain(dims).collect())?;
    add_parts(&mut chain, [(&of_da, &mut da), (&Parts::NONE, &mut Arg::Null), (&Parts::NONE, &mut Arg::Null)])?;

    let Some((dx, adds)) = dx else { return Ok(()) };
    let (dh, dropout) = (dh.to_read(), dropout(op.dropout));
    ToDx { w, a, dy, dh, dropout, dx, adds, rank: r }.launch(&mut chain, to_dx)
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
    fn or<'a>(&'a mut self, output: &'a mut Arg<'_, M>) -> Arg<'a, M> {
        self.memory.as_mut().map_or_else(|| output.again(), |memory| Arg::Write(memory, 0))
    }
}

/// Parts and their output.
type Output<'a, 'm, M> = (&'a Parts<M>, &'a mut Arg<'m, M>);

/// Adds up what lies in parts, if anything does, in one launch.
fn add_parts<D: Device>(chain: &mut Chain<'_, D>, outputs: [Output<'_, '_, D::Memory>; 3]) -> Result<()> {
    let (lens, counts) = (outputs.each_ref().map(|(parts, _)| parts.len), outputs.each_ref().map(|(parts, _)| parts.count));
    let plan = pointwise("lora_backward_sum", Shape { rows: lens.iter().sum::<u64>() as usize, cols: 1 })?;
    let parts = outputs.each_ref().map(|(parts, _)| parts.memory.as_ref().map_or(Arg::Null, |memory| Arg::Read(memory, 0)));
    let to = outputs.map(|(parts, to)| if parts.memory.is_some() { to.again() } else { Arg::Null });
    let sizes = lens.map(Arg::U64).into_iter().chain(counts.map(Arg::U32));
    chain.launch(plan, parts.into_iter().chain(to).chain(sizes).collect())
}

/// `W += scale·B·A`: one launch. Factors in f32 are not rounded: they come in by the kernel for any shape.
pub(super) fn merge<E: Float, D: Device>(cuda: &Cuda<E, D>, op: LoraMerge<'_, Cuda<E, D>>) -> Result<()> {
    const VERB: &str = "lora_merge";
    let ((a, a_is_f32), (b, b_is_f32)) = (factor_as_it_is(VERB, "a", op.a)?, factor_as_it_is(VERB, "b", op.b)?);
    let w = MatrixMut::new(VERB, "w", op.w)?;
    let is_f32 = a_is_f32 || b_is_f32;
    let plan = plan::merge(E::DTYPE, w.rows, w.cols, w.aligned && a.aligned && !is_f32)?;
    let key = op.rounding.key(E::DTYPE);
    let [key0, key1] = key.unwrap_or_default();
    let chance = [u32::from(key.is_some()), key0, key1].map(Arg::U32);
    let sizes = [w.rows, w.cols, a.rows, a.stride, b.stride, w.stride].map(Arg::U32);
    let which = [a_is_f32, b_is_f32].map(|is_f32| Arg::U32(is_f32.into())).into_iter().filter(|_| plan.kernel == VERB);
    let operands = [a.read(), b.read(), op.scale.into()].into_iter().chain(chance).chain([w.write()]);
    cuda.launch(plan, operands.chain(sizes).chain(which).collect())
}

/// The mask as kernels take it; without dropout nothing is below the threshold, and all is kept as it is.
pub(super) fn dropout<'a, M>(dropout: Option<Dropout>) -> [Arg<'a, M>; 4] {
    let ([key0, key1], threshold, keep_scale) =
        dropout.map_or(([0, 0], 0, 1.0), |dropout| (dropout.key(), dropout.threshold(), dropout.keep_scale()));
    [key0.into(), key1.into(), threshold.into(), keep_scale.into()]
}
