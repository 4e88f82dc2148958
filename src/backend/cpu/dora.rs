//! The verbs of weight decomposition (DoRA): norms of rows, and the scaling of outputs by `magnitude / norm`.

use rayon::prelude::*;

use super::gemm::{Dequantise, Factor, Matrix};
use super::linear::{elements, elements_mut, factor, matrix};
use super::pointwise::{CHUNK, column_sums, convert, convert_rows};
use super::scratch::ScratchGuard;
use super::simd::{Kernel, LANES, Simd};
use super::{Cpu, Engine};
use crate::element::Float;
use crate::error::Result;
use crate::op::{LoraRowNorm, Magnitude, MagnitudeBackward, WeightForm};
use crate::view::MatRef;

/// Rows of the weight in a task.
const ROWS: usize = 16;
/// Rows computed at the same time: each vector of `A` is loaded once for all of them.
const ROWS_AT_ONCE: usize = 4;
/// Columns of a task: their sums stay in L1.
const COLUMNS: usize = 1 << 10;

/// `norm = ‖W + scale·B·A‖`, row by row
pub(super) fn row_norm<E: Float>(engine: &Engine, op: LoraRowNorm<'_, Cpu<E>>) -> Result<()> {
    let (k, r, scale) = (op.w.cols(), op.a.rows(), op.scale);
    let (a, b) = (widened_factor(engine, factor(op.a))?, widened_factor(engine, factor(op.b))?);
    let (a, b) = (&a[..], &b[..]);
    engine.try_each(elements_mut(op.norm).par_chunks_mut(ROWS).enumerate(), |(task, norm)| {
        let (first, rows) = (task * ROWS, norm.len());
        match op.w.0 {
            WeightForm::Dense(w, _) => {
                let w = matrix(w).row_range(first..first + rows);
                engine.unit.run(RowNorms { w, a, b, scale, k, r, first, norm });
            }
            WeightForm::Quantised(w) => {
                let mut wide = engine.scratch.take(rows * k)?;
                let (rows, cols) = (first..first + rows, 0..k);
                engine.unit.run(Dequantise { w: w.view(), rows, cols, stride: k.max(1), to: &mut wide });
                engine.unit.run(RowNorms { w: Matrix::new(&wide, norm.len(), k), a, b, scale, k, r, first, norm });
            }
        }
        Ok(())
    })
}

/// The factor widened to `f32`, contiguous.
fn widened_factor<'e, E: Float>(engine: &'e Engine, factor: Factor<'_, E>) -> Result<ScratchGuard<'e>> {
    match factor {
        Factor::Elem(matrix) => widened_matrix(engine, matrix),
        Factor::F32(matrix) => widened_matrix(engine, matrix),
        Factor::Quantised(_) => widened_matrix(engine, Matrix::<f32>::new(&[], 0, 0)), // never: factors are not quantised
    }
}

/// The matrix widened to `f32`, contiguous.
fn widened_matrix<'e, T: Float>(engine: &'e Engine, matrix: Matrix<'_, T>) -> Result<ScratchGuard<'e>> {
    let mut widened = engine.scratch.take(matrix.rows() * matrix.cols())?;
    match matrix.as_contiguous() {
        Some(numbers) => convert(engine, numbers, &mut widened),
        None => convert_rows(engine, matrix, &mut widened),
    }
    Ok(widened)
}

/// The norms of some rows. Elements of `W + scale·B·A` are computed in registers and squared, and are not stored.
struct RowNorms<'a, E> {
    /// The task's rows.
    w: Matrix<'a, E>,
    a: &'a [f32],
    b: &'a [f32],
    scale: f32,
    k: usize,
    r: usize,
    first: usize,
    norm: &'a mut [f32],
}

impl<E: Float> Kernel for RowNorms<'_, E> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let rows = self.norm.len();
        let whole = rows / ROWS_AT_ONCE * ROWS_AT_ONCE;
        for row in (0..whole).step_by(ROWS_AT_ONCE) {
            self.norms::<S, ROWS_AT_ONCE>(s, row);
        }
        for row in whole..rows {
            self.norms::<S, 1>(s, row);
        }
    }
}

impl<E: Float> RowNorms<'_, E> {
    /// The norms of R rows of the task, from `row` on.
    #[inline(always)]
    fn norms<S: Simd, const R: usize>(&mut self, s: S, row: usize) {
        let (k, r, scale, first) = (self.k, self.r, s.splat(self.scale), self.first + row);
        let w: [&[E]; R] = std::array::from_fn(|q| self.w.run(row + q));
        let b: [&[f32]; R] = std::array::from_fn(|q| &self.b[(first + q) * r..][..r]);
        let mut squares = [s.splat(0.0); R];
        for v in 0..k.div_ceil(LANES) {
            let mut update = [s.splat(0.0); R];
            for d in 0..r {
                let a = s.widen_at(&self.a[d * k..][..k], v);
                for q in 0..R {
                    update[q] = s.mul_add(s.splat(b[q][d]), a, update[q]);
                }
            }
            for q in 0..R {
                let weight = s.mul_add(scale, update[q], s.widen_at(w[q], v));
                squares[q] = s.mul_add(weight, weight, squares[q]);
            }
        }
        let mut all = [s.splat(0.0); ROWS_AT_ONCE];
        all[..R].copy_from_slice(&squares);
        for (norm, sum) in self.norm[row..row + R].iter_mut().zip(s.sums(all)) {
            *norm = sum.sqrt();
        }
    }
}

/// `y = (magnitude / norm)·z + bias`
pub(super) fn magnitude<E: Float>(engine: &Engine, op: Magnitude<'_, Cpu<E>>) -> Result<()> {
    let factors = factors(engine, op.magnitude, op.norm)?;
    scale_columns(engine, &factors, op.bias.map(elements), elements(op.z), elements_mut(op.y));
    Ok(())
}

/// `dz = (magnitude / norm)·dy`, `dmagnitude = Σ dy·z / norm`, `dbias = Σ dy`
pub(super) fn magnitude_backward<E: Float>(engine: &Engine, op: MagnitudeBackward<'_, Cpu<E>>) -> Result<()> {
    if let Some(dz) = op.dz {
        scale_columns(engine, &factors(engine, op.magnitude, op.norm)?, None, elements(op.dy), elements_mut(dz));
    }
    if let Some(dmagnitude) = op.dmagnitude {
        let (dy, z, norm) = (elements(op.dy), elements(op.z), elements(op.norm));
        let task = |(task, sums)| engine.unit.run(ColumnDots { dy, z, norm, first: task * COLUMNS, sums });
        engine.each(elements_mut(dmagnitude).par_chunks_mut(COLUMNS).enumerate(), task);
    }
    if let Some(dbias) = op.dbias {
        column_sums(engine, matrix(op.dy), elements_mut(dbias));
    }
    Ok(())
}

/// `value / norm`, or 0 if `norm` is 0.
fn divide_by_norm(value: f32, norm: f32) -> f32 {
    if norm == 0.0 { 0.0 } else { value / norm }
}

/// `factors = magnitude / norm`
fn factors<'e, E: Float>(
    engine: &'e Engine,
    magnitude: MatRef<'_, Cpu<E>>,
    norm: MatRef<'_, Cpu<E>, f32>,
) -> Result<ScratchGuard<'e>> {
    let mut factors = widened_matrix(engine, matrix(magnitude))?;
    factors.iter_mut().zip(elements(norm)).for_each(|(factor, &norm)| *factor = divide_by_norm(*factor, norm));
    Ok(factors)
}

/// `y[i][j] = factors[j]·x[i][j] + bias[j]`
fn scale_columns<E: Float>(engine: &Engine, factors: &[f32], bias: Option<&[E]>, x: &[E], y: &mut [E]) {
    let cols = factors.len();
    if cols == 0 {
        return;
    }
    let rows = (CHUNK / cols).max(1) * cols;
    let chunks = y.par_chunks_mut(rows).zip(x.par_chunks(rows));
    engine.each(chunks, |(y, x)| engine.unit.run(ScaleColumns { factors, bias, x, y }));
}

struct ScaleColumns<'a, E> {
    factors: &'a [f32],
    bias: Option<&'a [E]>,
    x: &'a [E],
    y: &'a mut [E],
}

impl<E: Float> Kernel for ScaleColumns<'_, E> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let cols = self.factors.len();
        for (x, y) in self.x.chunks_exact(cols).zip(self.y.chunks_exact_mut(cols)) {
            for (v, y) in y.chunks_mut(LANES).enumerate() {
                let bias = self.bias.map_or(s.splat(0.0), |bias| s.widen_at(bias, v));
                s.narrow_to(s.mul_add(s.widen_at(self.factors, v), s.widen_at(x, v), bias), y);
            }
        }
    }
}

/// `sums[j] = Σ_i dy[i][j]·z[i][j] / norm[j]` for some columns, row by row
struct ColumnDots<'a, E> {
    dy: &'a [E],
    z: &'a [E],
    norm: &'a [f32],
    first: usize,
    sums: &'a mut [f32],
}

impl<E: Float> Kernel for ColumnDots<'_, E> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (cols, columns) = (self.norm.len(), self.first..self.first + self.sums.len());
        self.sums.fill(0.0);
        for (dy, z) in self.dy.chunks_exact(cols).zip(self.z.chunks_exact(cols)) {
            let (dy, z) = (&dy[columns.clone()], &z[columns.clone()]);
            for (v, sum) in self.sums.chunks_mut(LANES).enumerate() {
                s.narrow_to(s.mul_add(s.widen_at(dy, v), s.widen_at(z, v), s.widen_at(sum, 0)), sum);
            }
        }
        self.sums.iter_mut().zip(&self.norm[columns]).for_each(|(sum, &norm)| *sum = divide_by_norm(*sum, norm));
    }
}
