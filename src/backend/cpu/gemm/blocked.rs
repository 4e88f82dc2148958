//! The blocked nest, after BLIS (F. G. Van Zee and R. A. van de Geijn, "BLIS: a framework for rapidly instantiating BLAS
//! functionality", ACM TOMS 2015), with the terms of the sum laid end to end along the depth:
//!
//! ```text
//! for each ROWS of the output                          loop 3 (ic)
//!   pack the left side, all of its depth, into MR panels              (parallel)
//!   for each strip of columns                          loop 5 (jc)    (parallel)
//!     for each KC of the depth                         loop 4 (pc)
//!       pack the right side into NR panels: they stay in the L2 of the core that multiplies them
//!       for each MR rows                               loop 1 (ir)
//!         for each NR columns                          loop 2 (jr)
//!           tile: registers += left panel · right panel
//! ```
//!
//! BLIS shares the packed right side among the cores; here each core packs the strip that it owns, so there is no barrier in
//! the depth and nothing that was packed travels between cores but the left side, which is the smaller one.
//!
//! A term of the sum that is only r deep (`h·Bᵀ`) shares the last block with the end of the term before it: no second pass
//! over the output. The depth is cut term by term, so the sum over the base weights is made in the same order with an adapter
//! and without.

use std::ops::Range;

use rayon::prelude::*;

use super::super::Engine;
use super::super::pointwise::ConvertChunk;
use super::super::scratch::Taken;
use super::super::simd::{Kernel, LANES, Lanes, Simd, Unit};
use super::outer::Outer;
use super::pack::{Panels, Side};
use super::{Block, Factor, Init, LowRank, Matrix, Output, Parts, Product};
use crate::element::{DType, Float};
use crate::error::Result;

/// Depth of a block: a tile's sums are added to the output once for each, which costs about as much as 10 steps of depth.
const KC: usize = 512;
/// A strip's right panels (256·512 floats, 512 KiB) stay in a 1 MiB L2.
const NC: usize = 256;
/// Rows whose packed left side is kept at a time: 16 MiB at a depth of 4096. What is packed on the right is used on as many.
const ROWS: usize = 1008;
/// The most that a term may be deep to share a block with the term before it.
const SHORT: usize = 128;
/// How far ahead the output is asked for where the depth is short, in tiles.
const TILES_AHEAD: usize = 4;
/// Left panels that a task packs together: of a left side that is turned, each step of the depth gives them one run of numbers.
const GROUP: usize = 8;
/// Rows a task has, where there are too few columns for every thread to own some.
const FEW_ROWS: usize = 84;

/// The tallest and the widest tile of any unit, in rows and vectors.
const MAX_TILE: usize = 14 * 2;

/// `out = init + Σ scale·lhs·rhs`
pub(super) fn run<E: Float, O: Float>(
    engine: &Engine,
    mut out: Output<'_, O>,
    init: Init<'_, E>,
    terms: &[Product<'_, E>],
) -> Result<()> {
    let depth = Depth::of(terms);
    let mut left = Left::new(engine, out.rows(), depth)?;
    for rows in chunks(out.rows()) {
        left.pack(engine.unit, terms, rows.start, 0..depth.total());
        strips(engine, &left, out.rows_of(rows), init, terms)?;
    }
    Ok(())
}

/// `h = a_scale·lhs·a`, `out = init + lhs·w + b_scale·h·b`: the left side is packed once, and `h` joins it as more depth.
pub(super) fn run_low_rank<E: Float, O: Float>(
    engine: &Engine,
    mut h: Output<'_, f32>,
    mut out: Output<'_, O>,
    init: Init<'_, E>,
    LowRank { lhs, w, a_scale, a, b_scale, b }: LowRank<'_, E>,
    mut outer: Option<Outer<'_>>,
) -> Result<()> {
    let (m, k, r) = (h.rows(), lhs.cols(), h.cols());
    let (to_h, base) = (Product { scale: a_scale, lhs, rhs: a }, Product { scale: 1.0, lhs, rhs: w });
    let mut left = Left::new(engine, m, Depth([k, r]))?;
    for rows in chunks(m) {
        left.pack(engine.unit, &[base], rows.start, 0..k);
        if let Some(outer) = &mut outer {
            outer.add(engine, &left, rows.clone())?;
        }
        strips(engine, &left, h.rows_of(rows.clone()), Init::Zero, &[to_h])?;
        let update = Product { scale: b_scale, lhs: Factor::Wide(Matrix::new(h.data(), m, r)), rhs: b };
        left.pack(engine.unit, &[base, update], rows.start, k..k + r);
        strips(engine, &left, out.rows_of(rows), init, &[base, update])?;
    }
    Ok(())
}

/// `out = scale·lhsᵀ·rhs`
pub(super) fn run_outer<E: Float>(engine: &Engine, lhs: Factor<'_, E>, mut outer: Outer<'_>) -> Result<()> {
    let (m, n) = (lhs.rows(), lhs.cols());
    if m == 0 {
        outer.out.data().fill(0.0);
    }
    let mut left = Left::new(engine, m, Depth([n, 0]))?;
    let term = Product { scale: 1.0, lhs, rhs: lhs }; // only its left side is read
    for rows in chunks(m) {
        left.pack(engine.unit, &[term], rows.start, 0..n);
        outer.add(engine, &left, rows)?;
    }
    Ok(())
}

/// The rows of the output, at most `ROWS` at a time.
fn chunks(rows: usize) -> impl Iterator<Item = Range<usize>> {
    (0..rows).step_by(ROWS).map(move |start| start..rows.min(start + ROWS))
}

/// How deep the terms of a sum are, laid end to end, and how that depth is cut into blocks: each term into equal ones of at
/// most `KC`, but a short term joins the block before it.
#[derive(Clone, Copy, Debug)]
struct Depth([usize; 2]);

impl Depth {
    fn of<E>(terms: &[Product<'_, E>]) -> Self {
        debug_assert!(terms.len() <= 2);
        let depth = |i: usize| terms.get(i).map_or(0, Product::depth);
        Self([depth(0), depth(1)])
    }

    fn total(self) -> usize {
        self.0[0] + self.0[1]
    }

    /// The block that begins at `start`: where one begins, or at 0.
    #[inline]
    fn block(self, start: usize) -> Range<usize> {
        let [first, second] = self.0;
        let (begin, depth) = if start < first { (0, first) } else { (first, second) };
        let step = depth.div_ceil(depth.div_ceil(KC).max(1)).max(1);
        let end = (start + step - (start - begin) % step).min(begin + depth);
        let joins = end == first && second <= SHORT;
        start..if joins { self.total() } else { end }
    }

    fn blocks(self) -> impl Iterator<Item = Range<usize>> {
        let next = move |block: &Range<usize>| Some(self.block(block.end)).filter(|block| !block.is_empty());
        std::iter::successors(Some(self.block(0)).filter(|block| !block.is_empty()), next)
    }

    /// The steps in the longest block.
    fn longest(self) -> usize {
        self.blocks().map(|block| block.len()).max().unwrap_or(0)
    }
}

/// The packed left side of a chunk of rows: for each block of the depth, panels one after another, each `MR` numbers for each
/// step of the block.
pub(super) struct Left<'e> {
    numbers: Taken<'e>,
    depth: Depth,
    panels: usize,
    mr: usize,
}

impl<'e> Left<'e> {
    fn new(engine: &'e Engine, rows: usize, depth: Depth) -> Result<Self> {
        let (mr, _) = engine.unit.run(TileShape);
        let panels = rows.min(ROWS).div_ceil(mr);
        Ok(Self { numbers: engine.scratch.take(panels * mr * depth.total())?, depth, panels, mr })
    }

    /// Packs the rows from `first` on, for some of the depth.
    fn pack<E: Float>(&mut self, unit: Unit, terms: &[Product<'_, E>], first: usize, within: Range<usize>) {
        let (mr, rows) = (self.mr, terms.first().map_or(0, |term| term.lhs.rows()));
        let there = (rows - first).div_ceil(mr);
        for block in self.depth.blocks() {
            let depth = block.start.max(within.start)..block.end.min(within.end);
            if depth.is_empty() {
                continue;
            }
            let (stride, begins) = (mr * block.len(), mr * (depth.start - block.start));
            let panels = &mut self.numbers[self.panels * mr * block.start..][..self.panels.min(there) * stride];
            panels.par_chunks_mut(GROUP * stride).enumerate().for_each(|(group, to)| {
                let (first, depth) = (first + group * GROUP * mr, depth.clone());
                unit.run(Panels { side: Side::Left, terms, depth, first, width: mr, stride, to: &mut to[begins..] });
            });
        }
    }

    /// Panel `i`, for a block of the depth or the beginning of one.
    #[inline(always)]
    fn panel(&self, i: usize, within: &Range<usize>) -> &[f32] {
        let whole = self.mr * self.depth.block(within.start).len();
        &self.numbers[self.panels * self.mr * within.start + i * whole..][..self.mr * within.len()]
    }

    /// What some steps of the depth have of its blocks.
    pub(super) fn blocks_within(&self, depth: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let part = move |block: Range<usize>| block.start.max(depth.start)..block.end.min(depth.end);
        self.depth.blocks().map(part).filter(|part| !part.is_empty())
    }

    /// Panel `i`, for some steps within a block.
    #[inline(always)]
    pub(super) fn panel_part(&self, i: usize, within: &Range<usize>) -> &[f32] {
        let mut blocks = self.depth.blocks();
        let start = blocks.find(|block| block.end > within.start).map_or(0, |block| block.start);
        &self.panel(i, &(start..within.end))[self.mr * (within.start - start)..]
    }
}

/// Loop 5: a task owns a strip of columns and packs the right side for itself.
fn strips<E: Float, O: Float>(
    engine: &Engine,
    left: &Left<'_>,
    out: Output<'_, O>,
    init: Init<'_, E>,
    terms: &[Product<'_, E>],
) -> Result<()> {
    let depth = Depth::of(terms);
    let deepest = depth.longest();
    // A shallow product is as wide as L2 allows: its rows are read and written in long runs.
    let (_, nr) = engine.unit.run(TileShape);
    let (nr, threads) = (if out.cols() <= LANES { LANES } else { nr }, rayon::current_num_threads());
    let across = Parts::new(out.cols(), nr, NC * KC / deepest.max(1), threads);
    let rows = if across.count() < threads { FEW_ROWS } else { ROWS };
    let down = Parts::new(out.rows(), left.mr, rows, 1);
    let blocks = if O::DTYPE == DType::F32 || depth.total() <= deepest { 0 } else { down.longest() * across.longest() };
    let len = across.longest() * deepest;
    engine.scratch.reserve(threads.min(down.count() * across.count()), len + blocks)?;
    out.for_each_block(down, across, |block| {
        let mut memory = engine.scratch.take(len + blocks)?;
        let (right, sums) = memory.split_at_mut(len);
        engine.unit.run(Strip { block, init, terms, left, right, sums, nr });
        Ok(())
    })
}

/// Loops 4, 1 and 2 over one strip of the output.
struct Strip<'a, 'o, E, O> {
    block: Block<'o, O>,
    init: Init<'a, E>,
    terms: &'a [Product<'a, E>],
    left: &'a Left<'a>,
    /// Room for the deepest block of the strip's right side.
    right: &'a mut [f32],
    /// Room for the sums, where they must not be rounded between two blocks of the depth; else empty.
    sums: &'a mut [f32],
    nr: usize,
}

impl<E: Float, O: Float> Kernel for Strip<'_, '_, E, O> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        if self.sums.is_empty() {
            return depth_loop(s, &mut self.block, self.init, self.terms, self.left, self.right, self.nr);
        }
        let (rows, cols) = (self.block.rows.clone(), self.block.cols.clone());
        let sums = &mut self.sums[..rows.len() * cols.len()];
        if let Init::Output = self.init {
            for (i, sums) in sums.chunks_exact_mut(cols.len()).enumerate() {
                ConvertChunk { from: self.block.line(i), to: sums }.run(s);
            }
        }
        let mut block = Block::over(sums, rows, cols);
        depth_loop(s, &mut block, self.init, self.terms, self.left, self.right, self.nr);
        for i in 0..block.rows.len() {
            ConvertChunk { from: block.line(i), to: self.block.line(i) }.run(s);
        }
    }
}

/// Loop 4.
#[inline(always)]
fn depth_loop<S: Simd, E: Float, O: Float>(
    s: S,
    block: &mut Block<'_, O>,
    init: Init<'_, E>,
    terms: &[Product<'_, E>],
    left: &Left<'_>,
    right: &mut [f32],
    nr: usize,
) {
    let depth = Depth::of(terms);
    let mut start = 0;
    loop {
        let within = depth.block(start);
        if !within.is_empty() {
            let (first, stride) = (block.cols.start, nr * within.len());
            let to = &mut right[..block.cols.len().div_ceil(nr) * stride];
            Panels { side: Side::Right, terms, depth: within.clone(), first, width: nr, stride, to }.run(s);
        }
        let init = if start == 0 { init } else { Init::Output };
        if S::NV == 2 && nr == 2 * LANES {
            tiles::<S, E, O, 2>(s, block, init, &within, left, right);
        } else {
            tiles::<S, E, O, 1>(s, block, init, &within, left, right);
        }
        start = within.end;
        if start == depth.total() {
            return;
        }
    }
}

/// Loops 1 and 2, on tiles `NV` vectors wide.
#[inline(always)]
fn tiles<S: Simd, E: Float, O: Float, const NV: usize>(
    s: S,
    block: &mut Block<'_, O>,
    init: Init<'_, E>,
    within: &Range<usize>,
    left: &Left<'_>,
    right: &[f32],
) {
    let (mr, nr, col) = (S::MR, NV * LANES, block.cols.start);
    let (height, width) = (block.rows.len(), block.cols.len());
    let mut tile = [[0.0; LANES]; MAX_TILE];
    // A shallow tile is done before its own lines of the output could come: ask for those of a later one.
    let ahead = if within.len() < SHORT { TILES_AHEAD * nr } else { 0 };
    for i in (0..height).step_by(mr) {
        let left = left.panel((block.rows.start + i) / mr, within);
        for j in (0..width).step_by(nr) {
            let (rows, cols) = (i..height.min(i + mr), j..width.min(j + nr));
            for row in rows.clone() {
                for v in 0..NV {
                    s.prefetch(&block.line(row)[cols.clone()], ahead + v * LANES);
                }
            }
            s.tile::<NV>(left, &right[j * within.len()..][..nr * within.len()], &mut tile);
            for (row, sums) in rows.zip(tile.as_chunks::<NV>().0) {
                let line = &mut block.line(row)[cols.clone()];
                match line.as_chunks_mut().0.first_chunk_mut::<NV>() {
                    Some(line) => finish_whole(s, sums, init, col + j, line),
                    None => super::finish(s, sums, init, col + j, line),
                }
            }
        }
    }
}

/// [`finish`](super::finish) for a line that is as wide as the tile.
#[inline(always)]
fn finish_whole<S: Simd, E: Float, O: Float, const NV: usize>(
    s: S,
    sums: &[Lanes<f32>; NV],
    init: Init<'_, E>,
    col: usize,
    line: &mut [Lanes<O>; NV],
) {
    for v in 0..NV {
        let sum = s.load(&sums[v]);
        let value = match init {
            Init::Zero => sum,
            Init::Row(row) => s.add(sum, s.widen_at(&row[col..], v)),
            Init::Output => s.add(sum, s.widen(&line[v])),
        };
        s.narrow(value, &mut line[v]);
    }
}

/// Rows and columns of the unit's tile.
struct TileShape;

impl Kernel for TileShape {
    type Out = (usize, usize);
    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> (usize, usize) {
        (S::MR, S::NV * LANES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cuts(k: usize, r: usize) -> Vec<usize> {
        let depth = Depth([k, r]);
        assert!(depth.blocks().all(|block| block.len() <= depth.longest() && block.len() <= KC + SHORT));
        std::iter::once(0).chain(depth.blocks().map(|block| block.end)).collect()
    }

    #[test]
    fn short_terms_join_the_block_before_them() {
        assert_eq!(cuts(1100, 0), [0, 367, 734, 1100]);
        assert_eq!(cuts(1100, 16), [0, 367, 734, 1116]);
        assert_eq!(cuts(16, 1100), [0, 16, 383, 750, 1116]);
        assert_eq!(cuts(1100, 129), [0, 367, 734, 1100, 1229]);
        assert_eq!(cuts(0, 7), [0, 7]);
        assert_eq!(cuts(0, 0), [0]);
    }

    proptest! {
        /// So the sum over `W` is made in the same order with an adapter and without.
        #[test]
        fn a_second_term_does_not_move_the_cuts_of_the_first(k in 1usize..4000, r in 0usize..1200) {
            let (alone, both) = (cuts(k, 0), cuts(k, r));
            prop_assert_eq!(&alone[..alone.len() - 1], &both[..alone.len() - 1]);
            prop_assert!(both.windows(2).all(|cut| cut[0] < cut[1]));
            prop_assert_eq!(both[both.len() - 1], k + r);
        }
    }
}
