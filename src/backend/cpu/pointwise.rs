//! The verbs that pass over memory once: relu and its derivative, sums, dropout, rounding, cross-entropy.

use rayon::prelude::*;

use super::gemm::Matrix;
use super::linear::{elements, elements_mut};
use super::simd::{Kernel, LANES, Simd};
use super::small_work::SMALL_MATRIX;
use super::{Cpu, Engine};
use crate::element::Float;
use crate::error::Result;
use crate::op::{
    Accumulate, Add, CrossEntropy, Dropout, DropoutForward, IGNORED, Relu, ReluBackward, round_stochastic, rounding_words,
};

/// Elements of a task: more work than handing the task to another thread.
pub(super) const CHUNK: usize = SMALL_MATRIX;
/// The fewest columns of a task: 512 contiguous bytes of each row of `f32`. Their sums stay in L1.
const MIN_COLUMNS: usize = 8 * LANES;

/// `y = max(x, 0)`
pub(super) fn relu<E: Float>(engine: &Engine, op: Relu<'_, Cpu<E>>) -> Result<()> {
    let chunks = elements_mut(op.y).par_chunks_mut(CHUNK).zip(elements(op.x).par_chunks(CHUNK));
    engine.each(chunks, |(y, x)| engine.unit.run(ReluChunk { x, y }));
    Ok(())
}

struct ReluChunk<'a, E> {
    x: &'a [E],
    y: &'a mut [E],
}

impl<E: Float> Kernel for ReluChunk<'_, E> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (v, y) in self.y.chunks_mut(LANES).enumerate() {
            s.narrow_to(s.relu(s.widen_at(self.x, v)), y);
        }
    }
}

/// `dx = dy` where `y > 0`, else 0
pub(super) fn relu_backward<E: Float>(engine: &Engine, op: ReluBackward<'_, Cpu<E>>) -> Result<()> {
    let (y, dy) = (elements(op.y).par_chunks(CHUNK), elements(op.dy).par_chunks(CHUNK));
    let chunks = elements_mut(op.dx).par_chunks_mut(CHUNK).zip(y).zip(dy);
    engine.each(chunks, |((dx, y), dy)| engine.unit.run(ReluBackwardChunk { y, dy, dx }));
    Ok(())
}

struct ReluBackwardChunk<'a, E> {
    y: &'a [E],
    dy: &'a [E],
    dx: &'a mut [E],
}

impl<E: Float> Kernel for ReluBackwardChunk<'_, E> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (v, dx) in self.dx.chunks_mut(LANES).enumerate() {
            s.narrow_to(s.gate(s.widen_at(self.y, v), s.widen_at(self.dy, v)), dx);
        }
    }
}

/// `y += x`
pub(super) fn add<E: Float>(engine: &Engine, op: Add<'_, Cpu<E>>) -> Result<()> {
    let chunks = elements_mut(op.y).par_chunks_mut(CHUNK).zip(elements(op.x).par_chunks(CHUNK));
    engine.each(chunks, |(y, x)| engine.unit.run(AddChunk { x, y }));
    Ok(())
}

struct AddChunk<'a, E> {
    x: &'a [E],
    y: &'a mut [E],
}

impl<E: Float> Kernel for AddChunk<'_, E> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (v, y) in self.y.chunks_mut(LANES).enumerate() {
            s.narrow_to(s.add(s.widen_at(y, 0), s.widen_at(self.x, v)), y);
        }
    }
}

/// `y += scale·x`, in `f32`
pub(super) fn accumulate<E: Float>(engine: &Engine, op: Accumulate<'_, Cpu<E>>) -> Result<()> {
    let chunks = elements_mut(op.y).par_chunks_mut(CHUNK).zip(elements(op.x).par_chunks(CHUNK));
    engine.each(chunks, |(y, x)| engine.unit.run(AccumulateChunk { x, scale: op.scale, y }));
    Ok(())
}

struct AccumulateChunk<'a> {
    x: &'a [f32],
    scale: f32,
    y: &'a mut [f32],
}

impl Kernel for AccumulateChunk<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let scale = s.splat(self.scale);
        for (v, y) in self.y.chunks_mut(LANES).enumerate() {
            s.narrow_to(s.mul_add(scale, s.widen_at(self.x, v), s.widen_at(y, 0)), y);
        }
    }
}

/// `to = from`, rounded to nearest if `T` is 16-bit
pub(super) fn convert<F: Float, T: Float>(engine: &Engine, from: &[F], to: &mut [T]) {
    let chunks = to.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK));
    engine.each(chunks, |(to, from)| engine.unit.run(ConvertChunk { from, to }));
}

pub(super) struct ConvertChunk<'a, F, T> {
    pub(super) from: &'a [F],
    pub(super) to: &'a mut [T],
}

impl<F: Float, T: Float> Kernel for ConvertChunk<'_, F, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (v, to) in self.to.chunks_mut(LANES).enumerate() {
            s.narrow_to(s.widen_at(self.from, v), to);
        }
    }
}

/// `to = from` in `f32`, for a matrix with a row stride
pub(super) fn convert_rows<F: Float>(engine: &Engine, from: Matrix<'_, F>, to: &mut [f32]) {
    let rows = to.par_chunks_mut(from.cols().max(1)).enumerate();
    engine.each(rows, |(i, to)| engine.unit.run(ConvertChunk { from: from.run(i), to }));
}

/// `dbias[j] = Σ_i dy[i][j]`, row by row
pub(super) fn column_sums<E: Float>(engine: &Engine, dy: Matrix<'_, E>, dbias: &mut [f32]) {
    // The width of a task does not change the bits: each column is one sum, in the order of the rows.
    let width = (2 * CHUNK / dy.rows().max(1)).next_multiple_of(LANES).max(MIN_COLUMNS);
    let task = |(chunk, sums): (usize, &mut [f32])| engine.unit.run(ColumnSums { dy, first: chunk * width, sums });
    engine.each(dbias.par_chunks_mut(width).enumerate(), task);
}

struct ColumnSums<'a, E> {
    dy: Matrix<'a, E>,
    first: usize,
    sums: &'a mut [f32],
}

impl<E: Float> Kernel for ColumnSums<'_, E> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.sums.fill(0.0);
        for row in self.dy.runs() {
            let row = &row[self.first..][..self.sums.len()];
            for (v, sum) in self.sums.chunks_mut(LANES).enumerate() {
                s.narrow_to(s.add(s.widen_at(sum, 0), s.widen_at(row, v)), sum);
            }
        }
    }
}

/// `y = drop(x)`
pub(super) fn dropout_forward<E: Float>(engine: &Engine, op: DropoutForward<'_, Cpu<E>>) -> Result<()> {
    drop(engine, op.dropout, elements(op.x), elements_mut(op.y));
    Ok(())
}

/// `to = drop(from)`
pub(super) fn drop<F: Float, T: Float>(engine: &Engine, dropout: Dropout, from: &[F], to: &mut [T]) {
    let chunks = to.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK)).enumerate();
    engine.each(chunks, |(chunk, (to, from))| {
        for (block, (to, from)) in to.chunks_mut(4).zip(from.chunks(4)).enumerate() {
            let factors = dropout.factors((chunk * CHUNK / 4 + block) as u64);
            for ((to, from), factor) in to.iter_mut().zip(from).zip(factors) {
                *to = T::from_f32(from.to_f32() * factor);
            }
        }
    });
}

/// `to = from`, rounded stochastically. `first`, a multiple of 4, is the index of `to[0]` in the whole matrix
pub(super) fn round<E: Float>(engine: &Engine, key: [u32; 2], first: usize, from: &[f32], to: &mut [E]) {
    let chunks = to.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK)).enumerate();
    engine.each(chunks, |(chunk, (to, from))| {
        for (block, (to, from)) in to.chunks_mut(4).zip(from.chunks(4)).enumerate() {
            let words = rounding_words(key, ((first + chunk * CHUNK) / 4 + block) as u64);
            for ((to, &from), word) in to.iter_mut().zip(from).zip(words) {
                *to = round_stochastic(from, word);
            }
        }
    });
}

/// `numbers = drop(numbers)`
pub(super) fn dropout(engine: &Engine, dropout: Dropout, numbers: &mut [f32]) {
    engine.each(numbers.par_chunks_mut(CHUNK).enumerate(), |(chunk, numbers)| {
        for (block, numbers) in numbers.chunks_mut(4).enumerate() {
            let factors = dropout.factors((chunk * CHUNK / 4 + block) as u64);
            for (number, factor) in numbers.iter_mut().zip(factors) {
                *number *= factor;
            }
        }
    });
}

/// `loss = mean(-log softmax(logits)[label])`, `dlogits = (softmax(logits) - onehot(label)) / c`, over `c` rows with a label
pub(super) fn cross_entropy<E: Float>(_: &Engine, op: CrossEntropy<'_, Cpu<E>>) -> Result<()> {
    let (m, n) = (op.logits.rows(), op.logits.cols());
    let loss = &mut elements_mut(op.loss)[0];
    *loss = 0.0;
    if m == 0 || n == 0 {
        return Ok(());
    }
    let rows = elements(op.logits).chunks_exact(n).zip(elements_mut(op.dlogits).chunks_exact_mut(n));
    let mut sum = 0.0;
    let counted = op.labels.counted() as f32;
    for ((logits, dlogits), &label) in rows.zip(op.labels.tensor().buffer().iter()) {
        if label == IGNORED {
            dlogits.fill(E::from_f32(0.0));
            continue;
        }
        let largest = logits.iter().fold(f32::NEG_INFINITY, |max, x| max.max(x.to_f32()));
        let powers: f32 = logits.iter().map(|x| (x.to_f32() - largest).exp()).sum();
        for (j, (to, x)) in dlogits.iter_mut().zip(logits).enumerate() {
            let softmax = (x.to_f32() - largest).exp() / powers;
            let onehot = if j == label as usize { 1.0 } else { 0.0 };
            *to = E::from_f32((softmax - onehot) / counted);
        }
        sum += powers.ln() + largest - logits[label as usize].to_f32();
    }
    *loss = sum / counted.max(1.0);
    Ok(())
}
