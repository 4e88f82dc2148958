//! One layer of the decoder as one operation of candle's autograd.
//!
//! Between operations, candle keeps every tensor until the backward pass is over, and adds each gradient to zeros in new memory. Here a
//! layer keeps what its backward pass reads, or, with checkpointing, its input alone; and gradients are added up where they lie.
//!
//! ```text
//! h = norm(x)     q, k, v = projections of h     x₂ = x + o(attention(rope(q), rope(k), v))
//! h = norm(x₂)    g, u = projections of h        out = x₂ + down(silu(g)·u)
//! ```

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};
use lowrank::op::Dropout;

use crate::attention::{Attention, Heads};
use crate::gate;
use crate::lend::{Elem, Lent, lend, rows_and_columns};
use crate::linear::{Adapter, LoraLinear, Single};
use crate::norm::RmsNorm;
use crate::numeric::{add, narrowed, widened};
use crate::op::{Base, Lora, LoraGradients, To, project, project_back};
use crate::rope::Angles;

/// A frozen projection and its update, if it has one.
pub(super) struct Projection {
    base: Base,
    /// Outputs × inputs.
    shape: (usize, usize),
    update: Option<Part>,
}

/// Where the factors of an update lie among those of the layer, and its scalars.
struct Part {
    a: Range<usize>,
    b: Range<usize>,
    scale: f32,
    dropout: Option<Dropout>,
}

/// All `A` and all `B` of some projections, each flat and one behind the other.
#[derive(Default)]
pub(super) struct Factors {
    a: Vec<Tensor>,
    b: Vec<Tensor>,
    lengths: [usize; 2],
}

impl Factors {
    /// A projection, whose adapter's factors are put behind those that are here.
    pub(super) fn projection(&mut self, layer: &LoraLinear, single: Single<'_>) -> Result<Projection> {
        let part = |(adapter, dropout): (&Adapter, Option<Dropout>)| {
            let ([a, b], [at_a, at_b]) = ([adapter.a(), adapter.b()], self.lengths);
            self.lengths = [at_a + a.elem_count(), at_b + b.elem_count()];
            self.a.push(a.flatten_all()?);
            self.b.push(b.flatten_all()?);
            let [end_a, end_b] = self.lengths;
            Ok::<_, candle_core::Error>(Part { a: at_a..end_a, b: at_b..end_b, scale: adapter.scaling(), dropout })
        };
        let update = single.map(part).transpose()?;
        Ok(Projection { base: layer.base().clone(), shape: layer.shape(), update })
    }

    /// All `A`, and all `B`. None if there are none.
    pub(super) fn join(&self) -> Result<Option<[Tensor; 2]>> {
        if self.a.is_empty() {
            return Ok(None);
        }
        Ok(Some([Tensor::cat(&self.a, 0)?, Tensor::cat(&self.b, 0)?]))
    }
}

/// A layer, with what is the same for all layers of a pass.
pub(super) struct LayerOp<E> {
    pub(super) projections: [Projection; 7],
    pub(super) norms: [RmsNorm; 2],
    pub(super) head_norms: Option<[RmsNorm; 2]>,
    pub(super) heads: Heads,
    pub(super) angles: Angles,
    pub(super) attention: Attention,
    /// Whether the backward pass runs the layer forward again.
    pub(super) checkpoint: bool,
    pub(super) kept: Mutex<Option<Kept<E>>>,
}

/// What the backward pass reads, beside the input.
pub(super) struct Kept<E> {
    /// Queries and keys before the norms of their heads, if there are such norms.
    raw: Option<[Vec<E>; 2]>,
    /// Turned by their positions, and values.
    qkv: [Vec<E>; 3],
    /// What attention made of them.
    y: Vec<E>,
    /// The input of the second half.
    x2: Vec<E>,
    /// The gate and what it gates.
    gu: [Vec<E>; 2],
    /// `drop(x)·Aᵀ` of each projection.
    h: [Vec<f32>; 7],
}

// The places of the projections among the seven.
const Q: usize = 0;
const K: usize = 1;
const V: usize = 2;
const O: usize = 3;
const GATE: usize = 4;
const UP: usize = 5;
const DOWN: usize = 6;

impl Projection {
    fn lora<'f>(&self, [a, b]: [&'f [f32]; 2]) -> Option<Lora<'f>> {
        let part = self.update.as_ref()?;
        Some(Lora { a: &a[part.a.clone()], b: &b[part.b.clone()], scale: part.scale, dropout: part.dropout })
    }
}

impl<E: Elem> LayerOp<E> {
    /// `y = projection of x`, in new memory or added to what is there.
    fn project(&self, at: usize, x: &[E], factors: [&[f32]; 2], y: To<'_, E>) -> Result<Vec<f32>> {
        let (projection, (n, k)) = (&self.projections[at], self.projections[at].shape);
        project(x, [x.len() / k, k, n], Some(&projection.base), projection.lora(factors), y)
    }

    /// The output of the layer, and what its backward pass reads.
    fn run(&self, x: &[E], factors: [&[f32]; 2]) -> Result<(Vec<E>, Kept<E>)> {
        let mut h: [Vec<f32>; 7] = Default::default();
        let tokens = x.len() / self.projections[Q].shape.1;
        let mut new = |at: usize, x: &[E]| -> Result<Vec<E>> {
            let mut y = vec![E::default(); tokens * self.projections[at].shape.0];
            h[at] = self.project(at, x, factors, To::Write(&mut y))?;
            Ok(y)
        };
        let normed = self.norms[0].run(x);
        let [mut q, mut k, v] = [new(Q, &normed)?, new(K, &normed)?, new(V, &normed)?];
        let mut raw = None;
        if let Some([q_norm, k_norm]) = &self.head_norms {
            let normed = [q_norm.run(&q), k_norm.run(&k)];
            raw = Some([q, k]);
            [q, k] = normed;
        }
        let [q, k] = [self.turn(&q, self.heads.q_columns(), 1.0)?, self.turn(&k, self.heads.kv_columns(), 1.0)?];
        let y: Vec<E> = narrowed(&self.attention.run([&widened(&q), &widened(&k), &widened(&v)])?);
        let mut x2 = x.to_vec();
        let of_o = self.project(O, &y, factors, To::Add(&mut x2))?;
        let normed = self.norms[1].run(&x2);
        let gu = [new(GATE, &normed)?, new(UP, &normed)?];
        let mut out = x2.clone();
        h[DOWN] = self.project(DOWN, &gate::forward(&gu[0], &gu[1]), factors, To::Add(&mut out))?;
        h[O] = of_o;
        Ok((out, Kept { raw, qkv: [q, k, v], y, x2, gu, h }))
    }

    /// Turns heads by the positions of their tokens, or back for a sign of -1.
    fn turn(&self, x: &[E], columns: usize, sign: f32) -> Result<Vec<E>> {
        self.angles.run(x, columns, sign)
    }

    /// The gradients of `A` and `B`, which are written, and of the input, if it is wanted.
    fn back(
        &self,
        x: &[E],
        kept: &Kept<E>,
        dy: &[E],
        factors: [&[f32]; 2],
        of_factors: [&mut [f32]; 2],
        wanted: bool,
    ) -> Result<Option<Vec<E>>> {
        let [da, db] = of_factors;
        // Makes the gradients of one projection's factors, and writes or adds that of its input.
        let mut back = |at: usize, x: &[E], dy: &[E], dx: Option<To<'_, E>>| {
            let (projection, (n, k)) = (&self.projections[at], self.projections[at].shape);
            let lora = match (projection.lora(factors), &projection.update) {
                (Some(lora), Some(Part { a, b, .. })) => {
                    Some((lora, LoraGradients { h: &kept.h[at], da: &mut da[a.clone()], db: &mut db[b.clone()] }))
                }
                _ => None,
            };
            project_back((x, dy), [x.len() / k, k, n], Some(&projection.base), lora, dx)
        };
        let [g, u] = &kept.gu;
        let mut ds = vec![E::default(); g.len()];
        back(DOWN, &gate::forward(g, u), dy, Some(To::Write(&mut ds)))?;
        let [dg, du] = gate::backward(g, u, &ds);
        let (normed, mut dh) = (self.norms[1].run(&kept.x2), vec![E::default(); x.len()]);
        back(GATE, &normed, &dg, Some(To::Write(&mut dh)))?;
        back(UP, &normed, &du, Some(To::Add(&mut dh)))?;
        let mut dx = dy.to_vec();
        add(&mut dx, &self.norms[1].back(&kept.x2, &dh));

        let mut dattention = vec![E::default(); kept.y.len()];
        back(O, &kept.y, &dx, Some(To::Write(&mut dattention)))?;
        let [q, k, v] = kept.qkv.each_ref().map(|part| widened(part));
        let [dq, dk, dv] = self.attention.back([&q, &k, &v, &widened(&dattention)])?.map(|part| narrowed::<E>(&part));
        let [mut dq, mut dk] = [self.turn(&dq, self.heads.q_columns(), -1.0)?, self.turn(&dk, self.heads.kv_columns(), -1.0)?];
        if let (Some([q_norm, k_norm]), Some([q, k])) = (&self.head_norms, &kept.raw) {
            [dq, dk] = [q_norm.back(q, &dq), k_norm.back(k, &dk)];
        }
        let normed = self.norms[0].run(x);
        if !wanted {
            back(Q, &normed, &dq, None)?;
            back(K, &normed, &dk, None)?;
            back(V, &normed, &dv, None)?;
            return Ok(None);
        }
        back(Q, &normed, &dq, Some(To::Write(&mut dh)))?;
        back(K, &normed, &dk, Some(To::Add(&mut dh)))?;
        back(V, &normed, &dv, Some(To::Add(&mut dh)))?;
        add(&mut dx, &self.norms[0].back(x, &dh));
        Ok(Some(dx))
    }
}

impl<E: Elem> CustomOp3 for LayerOp<E> {
    fn name(&self) -> &'static str {
        "lowrank-layer"
    }

    #[rustfmt::skip]
    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, a: &CpuStorage, la: &Layout, b: &CpuStorage, lb: &Layout) -> Result<(CpuStorage, Shape)> {
        let columns = rows_and_columns(lx).1;
        if columns != self.projections[Q].shape.1 {
            bail!("a layer of {} columns got {columns}", self.projections[Q].shape.1);
        }
        let (out, kept) = self.run(lend::<E>(x, lx)?, [lend(a, la)?, lend(b, lb)?])?;
        if !self.checkpoint {
            *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(kept);
        }
        Ok((E::to_cpu_storage_owned(out), lx.shape().clone()))
    }

    #[rustfmt::skip]
    fn bwd(&self, x: &Tensor, a: &Tensor, b: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let (lx, la, lb, ldy) = (Lent::new(x), Lent::new(a), Lent::new(b), Lent::new(&dy));
        let (x_numbers, factors) = (lx.slice::<E>()?, [la.slice()?, lb.slice()?]);
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let again = if kept.is_none() { Some(self.run(x_numbers, factors)?.1) } else { None };
        let Some(kept) = again.as_ref().or(kept.as_ref()) else { bail!("a layer has nothing to go back by") };
        let (mut da, mut db) = (vec![0f32; a.elem_count()], vec![0f32; b.elem_count()]);
        let dx = self.back(x_numbers, kept, ldy.slice()?, factors, [&mut da, &mut db], x.track_op())?;
        let dx = dx.map(|dx| Tensor::from_vec(dx, x.shape(), x.device())).transpose()?;
        let tensor = |vec, of: &Tensor| Tensor::from_vec(vec, of.shape(), of.device());
        Ok((dx, Some(tensor(da, a)?), Some(tensor(db, b)?)))
    }
}
