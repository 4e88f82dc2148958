//! Products in which each row of the left side has a right side of its own, or none: the adapters of a mixed batch.
//!
//! ```text
//! narrow   out[i][p]    = scale·Σ_j left[i][j]·right[slot of i][p][j]     h, dh
//! add      out[i][j]   += Σ_p scale·left[i][p]·right[slot of i][p][j]     y, dx
//! outer    out[g][p][j] = scale·Σ_i left[i][p]·right[i][j], the rows i of segment g     dA, dB
//! ```
//!
//! The right sides lie one after another, each `rank` rows, of which the first ones are the slot's own. Each sum is made in one order,
//! whatever the other rows are: along the depth, or in the order of the rows.

use std::ops::Range;

use super::super::Engine;
use super::super::simd::{Kernel, LANES, Lanes, Simd};
use super::dots::{dots, each_line};
use super::{Block, Factor, Matrix, Output, Parts};
use crate::element::Float;
use crate::error::{Error, Result};
use crate::op::{Segment, Slot};

/// Activations and factors of an update are stored as numbers: the requests have no form in which they are quantised.
fn quantised_factor() -> Error {
    Error::Unavailable { backend: "cpu", reason: "a factor of an update cannot be quantised".into() }
}

/// Steps of the depth whose products are summed in vectors; then their lanes are summed up.
const STRETCH: usize = 512;
/// Rows that a task takes: their part of a stretch stays in L2.
const ROWS: usize = 64;
/// Columns that a task takes: what 16 rows of the right side have of them, 64 KiB, stays in L2.
const COLUMNS: usize = 1024;
/// Vectors of a row whose sums stay in registers.
const WIDE: usize = 4;

/// The segments of a batch and the slots of a bank.
#[derive(Clone, Copy)]
pub(in super::super) struct Rows<'a> {
    pub(in super::super) segments: &'a [Segment],
    /// The rows that use a slot, sorted by slot.
    pub(in super::super) order: &'a [u32],
    pub(in super::super) slots: &'a [Option<Slot>],
    /// Rows of a right side: the rank that every slot has room for.
    pub(in super::super) rank: usize,
    /// Factor of the products, multiplied with the scaling of the slot; `None` for products that are not scaled.
    pub(in super::super) scale: Option<f32>,
}

/// A segment's part of a block.
struct Part<'a> {
    /// Rows of the batch.
    rows: &'a [u32],
    /// The first row of the slot in the right side.
    first: usize,
    rank: usize,
    scale: f32,
}

impl<'a> Rows<'a> {
    /// Without scaling.
    pub(in super::super) fn unscaled(self) -> Self {
        Self { scale: None, ..self }
    }

    fn part(&self, segment: &Segment, rows: &Range<usize>) -> Part<'a> {
        let of_segment = &self.order[segment.range.clone()];
        let at = |row: usize| of_segment.partition_point(|&there| (there as usize) < row);
        let Slot { rank, scaling } = self.slots.get(segment.slot).copied().flatten().unwrap_or(Slot { rank: 0, scaling: 0.0 });
        let scale = self.scale.map_or(1.0, |scale| scale * scaling);
        Part { rows: &of_segment[at(rows.start)..at(rows.end)], first: segment.slot * self.rank, rank, scale }
    }

    /// The part of each segment in these rows.
    fn parts(self, rows: Range<usize>) -> impl Iterator<Item = Part<'a>> {
        self.segments.iter().map(move |segment| self.part(segment, &rows)).filter(|part| !part.rows.is_empty())
    }
}

/// `out[i][p] = scale·Σ_j left[i][j]·right[slot of i][p][j]`; 0 beyond the rank of a slot, and in rows that use none
pub(in super::super) fn narrow_by_row<E: Float>(
    engine: &Engine,
    rows: Rows<'_>,
    left: Factor<'_, E>,
    right: Factor<'_, E>,
    out: Output<'_, f32>,
) -> Result<()> {
    let threads = engine.threads();
    let down = Parts::new(out.rows(), 1, ROWS, 1);
    let across = Parts::new(out.cols(), 1, out.cols().max(1), if down.count() < threads { threads } else { 1 });
    out.for_each_block(engine, down, across, left.cols(), |block| {
        match (left, right) {
            (Factor::Elem(left), Factor::Elem(right)) => engine.unit.run(Narrow { block, rows, left, right }),
            (Factor::Elem(left), Factor::F32(right)) => engine.unit.run(Narrow { block, rows, left, right }),
            (Factor::F32(left), Factor::Elem(right)) => engine.unit.run(Narrow { block, rows, left, right }),
            (Factor::F32(left), Factor::F32(right)) => engine.unit.run(Narrow { block, rows, left, right }),
            (Factor::Quantised(_), _) | (_, Factor::Quantised(_)) => return Err(quantised_factor()),
        }
        Ok(())
    })
}

struct Narrow<'a, 'o, L, R> {
    block: Block<'o, f32>,
    rows: Rows<'a>,
    left: Matrix<'a, L>,
    right: Matrix<'a, R>,
}

impl<L: Float, R: Float> Kernel for Narrow<'_, '_, L, R> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        for i in 0..self.block.rows().len() {
            self.block.line(i).fill(0.0);
        }
        for part in self.rows.parts(self.block.rows()) {
            let (pairs, rest) = part.rows.as_chunks::<2>();
            for &pair in pairs {
                self.sum::<S, 2, 2>(s, &part, pair);
            }
            for &row in rest {
                self.sum::<S, 1, 4>(s, &part, [row]);
            }
        }
    }
}

impl<L: Float, R: Float> Narrow<'_, '_, L, R> {
    /// The products of X rows, with W rows of the right side at a time.
    #[inline(always)]
    fn sum<S: Simd, const X: usize, const W: usize>(&mut self, s: S, part: &Part<'_>, rows: [u32; X]) {
        let (depth, cols) = (self.left.cols(), self.block.cols());
        let last = cols.end.min(part.rank);
        let lines = rows.map(|row| row as usize - self.block.rows().start);
        let mut left = [[[0.0; LANES]; X]; STRETCH / LANES];
        for start in (0..depth).step_by(STRETCH) {
            let within = start..depth.min(start + STRETCH);
            let left = &mut left[..within.len().div_ceil(LANES)];
            for x in 0..X {
                let from = &self.left.run(rows[x] as usize)[within.clone()];
                for (v, to) in left.iter_mut().enumerate() {
                    s.store(s.widen_at(from, v), &mut to[x]);
                }
            }
            for p in (cols.start..last).step_by(W) {
                // At the edge the last line is taken again, and what it gives is dropped.
                let line = |w: usize| -> &[R] { &self.right.run(part.first + (p + w).min(last - 1))[within.clone()] };
                let products = dots::<S, R, X, W>(s, left, each_line(line));
                for x in 0..X {
                    let mut four = [s.splat(0.0); 4];
                    four[..W].copy_from_slice(&products[x]);
                    let sums = &mut self.block.line(lines[x])[p - cols.start..last.min(p + W) - cols.start];
                    for (sum, more) in sums.iter_mut().zip(s.sums(four)) {
                        *sum += more;
                    }
                }
            }
        }
        if part.scale != 1.0 {
            for line in lines {
                self.block.line(line).iter_mut().for_each(|sum| *sum *= part.scale);
            }
        }
    }
}

/// `out[i][j] += Σ_p scale·left[i][p]·right[slot of i][p][j]`; rows that use no slot stay as they are. Row 0 of `out` is row `first` of
/// the batch.
pub(in super::super) fn add_products<E: Float>(
    engine: &Engine,
    rows: Rows<'_>,
    left: Matrix<'_, f32>,
    right: Factor<'_, E>,
    first: usize,
    out: Output<'_, f32>,
) -> Result<()> {
    if out.is_empty() {
        return Ok(());
    }
    let down = Parts::new(out.rows(), 1, super::plan::LHS_ROWS, 1);
    let across = Parts::new(out.cols(), WIDE * LANES, COLUMNS, engine.threads());
    out.for_each_block(engine, down, across, rows.rank, |block| {
        match right {
            Factor::Elem(right) => engine.unit.run(Add { block, first, rows, left, right }),
            Factor::F32(right) => engine.unit.run(Add { block, first, rows, left, right }),
            Factor::Quantised(_) => return Err(quantised_factor()),
        }
        Ok(())
    })
}

struct Add<'a, 'o, R> {
    block: Block<'o, f32>,
    first: usize,
    rows: Rows<'a>,
    left: Matrix<'a, f32>,
    right: Matrix<'a, R>,
}

impl<R: Float> Kernel for Add<'_, '_, R> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let (there, cols) = (of_batch(self.first, &self.block), self.block.cols());
        for part in self.rows.parts(there.clone()) {
            for col in (0..cols.len()).step_by(WIDE * LANES) {
                for &row in part.rows {
                    let (left, scale) = (&self.left.run(row as usize)[..part.rank], part.scale);
                    let line = &mut self.block.line(row as usize - there.start)[col..];
                    let right = |p: usize| -> &[R] { &self.right.run(part.first + p)[cols.clone()][col..] };
                    match line.as_chunks_mut().0.first_chunk_mut() {
                        Some(line) => add_wide(s, left, scale, right, line),
                        None => add_edge(s, left, scale, right, line),
                    }
                }
            }
        }
    }
}

/// The rows of a block, counted from the first row of the batch.
fn of_batch(first: usize, block: &Block<'_, f32>) -> Range<usize> {
    first + block.rows().start..first + block.rows().end
}

/// `line += Σ_p scale·left[p]·right(p)`, of a few vectors
#[inline(always)]
fn add_wide<'r, S: Simd, R: Float>(
    s: S,
    left: &[f32],
    scale: f32,
    right: impl Fn(usize) -> &'r [R],
    line: &mut [Lanes<f32>; WIDE],
) {
    let mut sums = [s.splat(0.0); WIDE];
    for v in 0..WIDE {
        sums[v] = s.load(&line[v]);
    }
    for (p, number) in left.iter().enumerate() {
        let (number, right) = (s.splat(scale * number), &right(p)[..WIDE * LANES]);
        for v in 0..WIDE {
            sums[v] = s.mul_add(number, s.widen_at(right, v), sums[v]);
        }
    }
    for v in 0..WIDE {
        s.store(sums[v], &mut line[v]);
    }
}

/// `line += Σ_p scale·left[p]·right(p)` for a line shorter than [`WIDE`] vectors
#[inline(always)]
fn add_edge<'r, S: Simd, R: Float>(s: S, left: &[f32], scale: f32, right: impl Fn(usize) -> &'r [R], line: &mut [f32]) {
    for (v, line) in line.chunks_mut(LANES).enumerate() {
        let mut sum = s.widen_at(line, 0);
        for (p, number) in left.iter().enumerate() {
            sum = s.mul_add(s.splat(scale * number), s.widen_at(right(p), v), sum);
        }
        s.narrow_to(sum, line);
    }
}

/// `out[i] += from[i]` in the rows that use a slot. Row 0 of `out` is row `first` of the batch.
pub(in super::super) fn add_rows(
    engine: &Engine,
    rows: Rows<'_>,
    from: Matrix<'_, f32>,
    first: usize,
    out: Output<'_, f32>,
) -> Result<()> {
    if out.is_empty() {
        return Ok(());
    }
    let down = Parts::new(out.rows(), 1, super::plan::LHS_ROWS, 1);
    let across = Parts::new(out.cols(), LANES, COLUMNS, engine.threads());
    out.for_each_block(engine, down, across, 1, |block| {
        engine.unit.run(AddRows { block, first, rows, from });
        Ok(())
    })
}

struct AddRows<'a, 'o> {
    block: Block<'o, f32>,
    first: usize,
    rows: Rows<'a>,
    from: Matrix<'a, f32>,
}

impl Kernel for AddRows<'_, '_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let (there, cols) = (of_batch(self.first, &self.block), self.block.cols());
        for &row in self.rows.parts(there.clone()).flat_map(|part| part.rows) {
            let from = &self.from.run(row as usize)[cols.clone()];
            for (v, to) in self.block.line(row as usize - there.start).chunks_mut(LANES).enumerate() {
                s.narrow_to(s.add(s.widen_at(to, 0), s.widen_at(from, v)), to);
            }
        }
    }
}

/// `out[g·rank + p][j] = scale·Σ_i left[i][p]·right[i][j]` over the rows `i` of segment `g`, in their order; 0 beyond the rank of a slot
pub(in super::super) fn outer_by_segment<E: Float>(
    engine: &Engine,
    rows: Rows<'_>,
    left: Matrix<'_, f32>,
    right: Factor<'_, E>,
    out: Output<'_, f32>,
) -> Result<()> {
    if out.is_empty() {
        return Ok(());
    }
    let down = Parts::new(out.rows(), rows.rank, 16 * rows.rank, 1);
    let across = Parts::new(out.cols(), 2 * LANES, COLUMNS, engine.threads());
    out.for_each_block(engine, down, across, rows.order.len(), |block| {
        match right {
            Factor::Elem(right) => engine.unit.run(OuterBySegment { block, rows, left, right }),
            Factor::F32(right) => engine.unit.run(OuterBySegment { block, rows, left, right }),
            Factor::Quantised(_) => return Err(quantised_factor()),
        }
        Ok(())
    })
}

struct OuterBySegment<'a, 'o, R> {
    block: Block<'o, f32>,
    rows: Rows<'a>,
    left: Matrix<'a, f32>,
    right: Matrix<'a, R>,
}

impl<R: Float> Kernel for OuterBySegment<'_, '_, R> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let (lines, rank) = (self.block.rows(), self.rows.rank);
        for (g, line) in lines.clone().step_by(rank).enumerate() {
            let part = self.rows.part(&self.rows.segments[line / rank], &(0..usize::MAX));
            for p in (0..part.rank).step_by(2) {
                if p + 1 < part.rank {
                    self.sum::<S, 2>(s, &part, (g * rank, p));
                } else {
                    self.sum::<S, 1>(s, &part, (g * rank, p));
                }
            }
            for p in part.rank..rank {
                self.block.line(g * rank + p).fill(0.0);
            }
        }
    }
}

impl<R: Float> OuterBySegment<'_, '_, R> {
    /// Lines `p` and following, P of them, of the block of a segment that begins at line `first`.
    #[inline(always)]
    fn sum<S: Simd, const P: usize>(&mut self, s: S, part: &Part<'_>, (first, p): (usize, usize)) {
        let (cols, scale) = (self.block.cols(), s.splat(part.scale));
        for col in (0..cols.len()).step_by(2 * LANES) {
            let width = (cols.len() - col).min(2 * LANES);
            let mut sums = [[s.splat(0.0); 2]; P];
            for &row in part.rows {
                let (left, right) = (&self.left.run(row as usize)[p..p + P], &self.right.run(row as usize)[cols.clone()][col..]);
                let right = &right[..width];
                let vectors = [s.widen_at(right, 0), if width > LANES { s.widen_at(right, 1) } else { s.splat(0.0) }];
                for i in 0..P {
                    let number = s.splat(left[i]);
                    for v in 0..2 {
                        sums[i][v] = s.mul_add(number, vectors[v], sums[i][v]);
                    }
                }
            }
            for i in 0..P {
                let line = &mut self.block.line(first + p + i)[col..col + width];
                for (v, line) in line.chunks_mut(LANES).enumerate() {
                    s.narrow_to(s.mul(scale, sums[i][v]), line);
                }
            }
        }
    }
}
