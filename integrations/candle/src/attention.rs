//! `softmax(scale·q·kᵀ)·v` of each head, over the tokens of the same sequence up to the own one, with a backward pass.
//!
//! Sequences of any length lie one after the other in the rows, so nothing is padded. Products are lowrank's, on views of the heads.
//! Scores exist for a block of rows at a time; the backward pass makes them again.

use std::ops::Range;
use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, WithDType, bail};
use lowrank::op::{LinearBackward, LinearForward};
use lowrank::{Cpu, MatRef};
use rayon::prelude::*;

use crate::lend::{Elem, Lent, by_dtype, lend, matrix, matrix_mut, wrapped};
use crate::numeric::{dot, exp, max, narrowed, sum, vectorised, widened};

/// How many heads there are, and how wide they are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Heads {
    /// Of `q`; a multiple of `kv`.
    pub(crate) q: usize,
    /// Of `k` and `v`.
    pub(crate) kv: usize,
    /// Columns of a head.
    pub(crate) dim: usize,
}

impl Heads {
    fn scale(self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }

    /// The heads of `q` that share a head of `k` and `v`.
    fn group(self, kv: usize) -> Range<usize> {
        let each = self.q / self.kv.max(1);
        kv * each..(kv + 1) * each
    }

    pub(crate) fn q_columns(self) -> usize {
        self.q * self.dim
    }

    pub(crate) fn kv_columns(self) -> usize {
        self.kv * self.dim
    }
}

type View<'v> = MatRef<'v, Cpu<f32>>;

/// One head of some rows of a matrix.
fn head<'m>(memory: &'m [f32], rows: &Range<usize>, columns: usize, dim: usize, at: usize) -> Result<View<'m>> {
    MatRef::strided(memory, (rows.len(), dim), rows.start * columns + at * dim, columns).map_err(wrapped)
}

/// Rows whose scores exist at a time.
const BLOCK: usize = 128;

/// The rows of a head in blocks, each with the number of keys that its last row sees. The first row sees `past + 1` keys.
fn blocks(rows: usize, past: usize) -> impl Iterator<Item = (Range<usize>, usize)> {
    (0..rows).step_by(BLOCK).map(move |first| {
        let end = rows.min(first + BLOCK);
        (first..end, past + end)
    })
}

/// `softmax(scale·q·kᵀ)` of a block of rows; row `i` sees `seen(i)` keys.
fn probabilities(q: View<'_>, k: View<'_>, scale: f32, seen: impl Fn(usize) -> usize) -> Result<Vec<f32>> {
    let (rows, keys) = (q.rows(), k.rows());
    let mut p = vec![0f32; rows * keys];
    let y = matrix_mut(&mut p, (rows, keys))?.into();
    LinearForward { x: q, w: k.into(), bias: None, y }.run(f32::cpu()?).map_err(wrapped)?;
    vectorised!({
        for (i, row) in p.chunks_exact_mut(keys.max(1)).enumerate() {
            let (row, unseen) = row.split_at_mut(seen(i));
            let most = scale * max(row);
            for s in row.iter_mut() {
                *s = exp(scale * *s - most);
            }
            let inverse = 1.0 / sum(row);
            for p in row.iter_mut() {
                *p *= inverse;
            }
            unseen.fill(0.0);
        }
    });
    Ok(p)
}

/// `out = softmax(scale·q·kᵀ)·v` of one head. The first row of `q` sees `past + 1` keys, each other one more.
fn forward_head(q: View<'_>, k: View<'_>, v: View<'_>, past: usize, scale: f32) -> Result<Vec<f32>> {
    let (rows, dim) = (q.rows(), q.cols());
    let mut out = vec![0f32; rows * dim];
    for (block, keys) in blocks(rows, past) {
        let q = q.row_range(block.clone()).map_err(wrapped)?;
        let [k, v] = [k, v].map(|part| part.row_range(0..keys));
        let p = probabilities(q, k.map_err(wrapped)?, scale, |i| past + block.start + i + 1)?;
        let out = matrix_mut(&mut out, (rows, dim))?.row_range(block.clone()).map_err(wrapped)?;
        let (w, dy) = (Some(v.map_err(wrapped)?.into()), matrix(&p, (block.len(), keys))?);
        LinearBackward { x: None, w, dy, dx: Some(out.into()), dw: None, dbias: None }.run(f32::cpu()?).map_err(wrapped)?;
    }
    Ok(out)
}

/// `out = softmax(scale·q·kᵀ)·v` of one token, whose heads are the rows of `q`. It sees all keys.
fn forward_token(q: View<'_>, k: View<'_>, v: View<'_>, scale: f32) -> Result<Vec<f32>> {
    let keys = k.rows();
    let p = probabilities(q, k, scale, |_| keys)?;
    let mut out = vec![0f32; q.rows() * q.cols()];
    let (dx, dy) = (matrix_mut(&mut out, (q.rows(), q.cols()))?.into(), matrix(&p, (q.rows(), keys))?);
    LinearBackward { x: None, w: Some(v.into()), dy, dx: Some(dx), dw: None, dbias: None }.run(f32::cpu()?).map_err(wrapped)?;
    Ok(out)
}

/// `dq` of one head; adds to `dk` and `dv`, both of the shape of `k`.
fn backward_head([q, k, v, dy]: [View<'_>; 4], scale: f32, dk: &mut [f32], dv: &mut [f32]) -> Result<Vec<f32>> {
    let (rows, dim) = (q.rows(), q.cols());
    let mut dq = vec![0f32; rows * dim];
    let cpu = f32::cpu()?;
    for (block, keys) in blocks(rows, 0) {
        let [q, dy] = [q, dy].map(|part| part.row_range(block.clone()));
        let [k, v] = [k, v].map(|part| part.row_range(0..keys));
        let (q, dy, k, v) = (q.map_err(wrapped)?, dy.map_err(wrapped)?, k.map_err(wrapped)?, v.map_err(wrapped)?);
        let p = probabilities(q, k, scale, |i| block.start + i + 1)?;
        let mut ds = vec![0f32; p.len()];
        let y = matrix_mut(&mut ds, (block.len(), keys))?.into();
        LinearForward { x: dy, w: v.into(), bias: None, y }.run(cpu).map_err(wrapped)?; // dp = dy·vᵀ
        vectorised!({
            for (p, ds) in p.chunks_exact(keys).zip(ds.chunks_exact_mut(keys)) {
                let mean = dot(p, ds);
                for (ds, p) in ds.iter_mut().zip(p) {
                    *ds = scale * p * (*ds - mean);
                }
            }
        });
        let (p, ds) = (matrix(&p, (block.len(), keys))?, matrix(&ds, (block.len(), keys))?);
        let mut part = vec![0f32; keys * dim];
        let dw = Some(matrix_mut(&mut part, (keys, dim))?);
        LinearBackward { x: Some(dy), w: None, dy: p, dx: None, dw, dbias: None }.run(cpu).map_err(wrapped)?; // pᵀ·dy
        dv.iter_mut().zip(&part).for_each(|(sum, part)| *sum += part);
        let dx = matrix_mut(&mut dq, (rows, dim))?.row_range(block.clone()).map_err(wrapped)?;
        let dw = Some(matrix_mut(&mut part, (keys, dim))?);
        LinearBackward { x: Some(q), w: Some(k.into()), dy: ds, dx: Some(dx.into()), dw, dbias: None }
            .run(cpu)
            .map_err(wrapped)?;
        dk.iter_mut().zip(&part).for_each(|(sum, part)| *sum += part);
    }
    Ok(dq)
}

/// Copies one head to its columns of some rows of a matrix.
fn put(out: &mut [f32], rows: &Range<usize>, columns: usize, at: usize, head: &[f32], dim: usize) {
    for (row, head) in rows.clone().zip(head.chunks_exact(dim)) {
        out[row * columns + at * dim..][..dim].copy_from_slice(head);
    }
}

/// Keys and values of the tokens of one sequence that are behind, of one layer.
#[derive(Clone, Debug, Default)]
pub(crate) struct Past {
    /// tokens × (kv heads · dim)
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Past {
    /// Whether it holds so many tokens of these heads.
    pub(crate) fn holds(&self, tokens: usize, heads: Heads) -> bool {
        [&self.k, &self.v].into_iter().all(|part| part.len() == tokens * heads.kv_columns())
    }
}

/// Attention of new tokens, which join the past of their sequences. Without a way back.
///
/// A task is one head of a sequence; for one token, all heads that share keys.
pub(crate) fn attend<'s>(
    heads: Heads,
    [q, k, v]: [&Tensor; 3],
    sequences: &'s [Range<usize>],
    pasts: &'s mut [&mut Past],
) -> Result<Tensor> {
    let [lq, lk, lv] = [q, k, v].map(Lent::new);
    by_dtype!(q.dtype(), E => {
        let [qs, ks, vs] = [lq.slice::<E>()?, lk.slice::<E>()?, lv.slice::<E>()?].map(widened);
        let (columns, kv_columns) = (heads.q_columns(), heads.kv_columns());
        for (rows, past) in sequences.iter().zip(pasts.iter_mut()) {
            past.k.extend_from_slice(&ks[rows.start * kv_columns..rows.end * kv_columns]);
            past.v.extend_from_slice(&vs[rows.start * kv_columns..rows.end * kv_columns]);
        }
        let each = heads.q / heads.kv;
        let of_sequence = |(rows, past): (&'s Range<usize>, &'s mut &mut Past)| {
            let width = if rows.len() == 1 { each } else { 1 };
            let past = &**past;
            (0..heads.q).step_by(width).map(move |at| (rows, past, at..at + width))
        };
        let tasks: Vec<_> = sequences.iter().zip(pasts.iter_mut()).flat_map(of_sequence).collect();
        let one = |(rows, past, group): &(&Range<usize>, &Past, Range<usize>)| {
            let (keys, dim) = (0..past.k.len() / kv_columns, heads.dim);
            let view = |memory| head(memory, &keys, kv_columns, dim, group.start / each);
            let (k, v) = (view(&past.k)?, view(&past.v)?);
            if rows.len() == 1 {
                let first = rows.start * columns + group.start * dim;
                let q = MatRef::strided(qs.as_slice(), (group.len(), dim), first, dim).map_err(wrapped)?;
                return forward_token(q, k, v, heads.scale());
            }
            forward_head(head(&qs, rows, columns, dim, group.start)?, k, v, keys.len() - rows.len(), heads.scale())
        };
        let few = sequences.iter().map(Range::len).sum::<usize>() < 4;
        let made: Vec<Vec<f32>> =
            if few { tasks.iter().map(one).collect::<Result<_>>()? } else { tasks.par_iter().map(one).collect::<Result<_>>()? };
        let mut out = vec![0f32; qs.len()];
        for ((rows, _, group), made) in tasks.into_iter().zip(&made) {
            let parts = made.chunks_exact(rows.len() * heads.dim);
            group.zip(parts).for_each(|(at, made)| put(&mut out, rows, columns, at, made, heads.dim));
        }
        Tensor::from_vec(narrowed::<E>(&out), q.shape(), q.device())
    })
}

/// Attention of whole sequences, which candle's autograd can run backward through.
#[derive(Clone)]
pub(crate) struct Attention {
    heads: Heads,
    /// The rows of each sequence.
    sequences: Arc<Vec<Range<usize>>>,
}

impl Attention {
    pub(crate) fn new(heads: Heads, sequences: Arc<Vec<Range<usize>>>) -> Self {
        Self { heads, sequences }
    }

    /// `q` is tokens × (heads · dim), `k` and `v` are tokens × (kv heads · dim).
    pub(crate) fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (tokens, Heads { q: heads, kv, .. }) = (q.dims2()?.0, self.heads);
        let fits = q.dims2()?.1 == self.heads.q_columns()
            && k.dims2()? == (tokens, self.heads.kv_columns())
            && v.dims2()? == (tokens, self.heads.kv_columns())
            && self.sequences.last().map_or(0, |last| last.end) == tokens;
        if !fits || kv == 0 || !heads.is_multiple_of(kv) {
            bail!("attention of {heads} and {kv} heads got q {:?}, k {:?}, v {:?}", q.dims(), k.dims(), v.dims());
        }
        q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, self.clone())
    }

    /// Each sequence with each head of `k` and `v`.
    fn tasks(&self) -> Vec<(&Range<usize>, usize)> {
        self.sequences.iter().flat_map(|rows| (0..self.heads.kv).map(move |kv| (rows, kv))).collect()
    }

    /// The values for all queries, in `f32`.
    pub(crate) fn run(&self, [q, k, v]: [&[f32]; 3]) -> Result<Vec<f32>> {
        let (heads, columns, kv_columns) = (self.heads, self.heads.q_columns(), self.heads.kv_columns());
        let tasks: Vec<(&Range<usize>, usize)> =
            self.sequences.iter().flat_map(|rows| (0..heads.q).map(move |at| (rows, at))).collect();
        let one = |&(rows, at): &(&Range<usize>, usize)| {
            let kv = at / (heads.q / heads.kv);
            let view = |memory| head(memory, rows, kv_columns, heads.dim, kv);
            forward_head(head(q, rows, columns, heads.dim, at)?, view(k)?, view(v)?, 0, heads.scale())
        };
        let made: Vec<Vec<f32>> = tasks.par_iter().map(one).collect::<Result<_>>()?;
        let mut out = vec![0f32; q.len()];
        tasks.iter().zip(&made).for_each(|((rows, at), made)| put(&mut out, rows, columns, *at, made, heads.dim));
        Ok(out)
    }

    /// The gradients of queries, keys and values.
    pub(crate) fn back(&self, [q, k, v, dy]: [&[f32]; 4]) -> Result<[Vec<f32>; 3]> {
        let (heads, columns, kv_columns) = (self.heads, self.heads.q_columns(), self.heads.kv_columns());
        let tasks = self.tasks();
        let one = |&(rows, kv): &(&Range<usize>, usize)| {
            let view = |memory| head(memory, rows, kv_columns, heads.dim, kv);
            let (k, v) = (view(k)?, view(v)?);
            let (mut dk, mut dv) = (vec![0f32; rows.len() * heads.dim], vec![0f32; rows.len() * heads.dim]);
            let each = |at| {
                let [q, dy] = [q, dy].map(|memory| head(memory, rows, columns, heads.dim, at));
                backward_head([q?, k, v, dy?], heads.scale(), &mut dk, &mut dv)
            };
            let dq = heads.group(kv).map(each).collect::<Result<Vec<_>>>()?;
            Ok((dq, dk, dv))
        };
        let made = tasks.par_iter().map(one).collect::<Result<Vec<_>>>()?;
        let (mut dq, mut dk, mut dv) = (vec![0f32; q.len()], vec![0f32; k.len()], vec![0f32; v.len()]);
        for ((rows, kv), (dqs, dks, dvs)) in tasks.into_iter().zip(&made) {
            heads.group(kv).zip(dqs).for_each(|(at, made)| put(&mut dq, rows, columns, at, made, heads.dim));
            put(&mut dk, rows, kv_columns, kv, dks, heads.dim);
            put(&mut dv, rows, kv_columns, kv, dvs, heads.dim);
        }
        Ok([dq, dk, dv])
    }
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "lowrank-attention"
    }

    #[rustfmt::skip]
    fn cpu_fwd(&self, q: &CpuStorage, lq: &Layout, k: &CpuStorage, lk: &Layout, v: &CpuStorage, lv: &Layout) -> Result<(CpuStorage, Shape)> {
        by_dtype!(q.dtype(), E => {
            let [q, k, v] = [lend::<E>(q, lq)?, lend::<E>(k, lk)?, lend::<E>(v, lv)?].map(widened);
            let y = self.run([&q, &k, &v])?;
            Ok((E::to_cpu_storage_owned(narrowed(&y)), lq.shape().clone()))
        })
    }

    #[rustfmt::skip]
    fn bwd(&self, q: &Tensor, k: &Tensor, v: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let lent = [q, k, v, &dy].map(Lent::new);
        by_dtype!(q.dtype(), E => {
            let [qs, ks, vs, dys] = [lent[0].slice::<E>()?, lent[1].slice::<E>()?, lent[2].slice::<E>()?, lent[3].slice::<E>()?].map(widened);
            let [dq, dk, dv] = self.back([&qs, &ks, &vs, &dys])?;
            let tensor = |numbers: &[f32], of: &Tensor| Tensor::from_vec(narrowed::<E>(numbers), of.shape(), of.device());
            Ok((Some(tensor(&dq, q)?), Some(tensor(&dk, k)?), Some(tensor(&dv, v)?)))
        })
    }
}
