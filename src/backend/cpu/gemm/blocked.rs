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
use super::super::simd::{Kernel, LANES, Simd, Unit};
use super::pack::{Panel, Side};
use super::{Block, Factor, Init, LowRank, Matrix, Output, Parts, Product};
use crate::element::{DType, Float};
use crate::error::Result;

/// Depth of a block: a tile's sums are added to the output once for each, which costs about as much as 20 steps of depth.
const KC: usize = 384;
/// A strip's right panels (384·384 floats, 576 KiB) stay in a 1 MiB L2.
const NC: usize = 384;
/// Rows whose packed left side is kept at a time: 16 MiB at a depth of 4096. What is packed on the right is used on as many.
const ROWS: usize = 1008;
/// The most that a term may be deep to share a block with the term before it.
const SHORT: usize = 128;
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
    let depth = terms.iter().map(Product::depth).sum();
    let mut left = Left::new(engine, out.rows(), depth)?;
    for rows in chunks(out.rows()) {
        left.pack(engine.unit, terms, rows.start, 0..depth);
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
) -> Result<()> {
    let (m, k, r) = (h.rows(), lhs.cols(), h.cols());
    let (to_h, base) = (Product { scale: a_scale, lhs, rhs: a }, Product { scale: 1.0, lhs, rhs: w });
    let mut left = Left::new(engine, m, k + r)?;
    for rows in chunks(m) {
        left.pack(engine.unit, &[base], rows.start, 0..k);
        strips(engine, &left, h.rows_of(rows.clone()), Init::Zero, &[to_h])?;
        let update = Product { scale: b_scale, lhs: Factor::Wide(Matrix::new(h.data(), m, r)), rhs: b };
        let terms = [base, update];
        left.pack(engine.unit, &terms, rows.start, k..k + r);
        strips(engine, &left, out.rows_of(rows), init, &terms)?;
    }
    Ok(())
}

/// The rows of the output, at most `ROWS` at a time.
fn chunks(rows: usize) -> impl Iterator<Item = Range<usize>> {
    (0..rows).step_by(ROWS).map(move |start| start..rows.min(start + ROWS))
}

/// The packed left side of a chunk of rows: panels one after another, each `MR` numbers for each step of the whole depth.
struct Left<'e> {
    panels: Taken<'e>,
    /// Numbers in a panel.
    len: usize,
    mr: usize,
}

impl<'e> Left<'e> {
    fn new(engine: &'e Engine, rows: usize, depth: usize) -> Result<Self> {
        let (mr, _) = engine.unit.run(TileShape);
        let len = mr * depth;
        Ok(Self { panels: engine.scratch.take(rows.min(ROWS).div_ceil(mr) * len)?, len, mr })
    }

    /// Packs the rows from `first` on, for some of the depth.
    fn pack<E: Float>(&mut self, unit: Unit, terms: &[Product<'_, E>], first: usize, depth: Range<usize>) {
        let (mr, part) = (self.mr, self.mr * depth.start..self.mr * depth.end);
        let rows = terms.first().map_or(0, |term| term.lhs.rows());
        let there = ((rows - first).div_ceil(mr) * self.len).min(self.panels.len());
        let there = &mut self.panels[..there];
        there.par_chunks_exact_mut(self.len.max(1)).enumerate().for_each(|(panel, to)| {
            let (first, to) = (first + panel * mr, &mut to[part.clone()]);
            unit.run(Panel { side: Side::Left, terms, depth: depth.clone(), first, width: mr, to });
        });
    }

    /// Panel `i`, from one step of the depth on to another.
    #[inline(always)]
    fn panel(&self, i: usize, depth: &Range<usize>) -> &[f32] {
        &self.panels[i * self.len..][self.mr * depth.start..self.mr * depth.end]
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
    let depth: usize = terms.iter().map(Product::depth).sum();
    let deepest = deepest(terms);
    // A shallow product is as wide as L2 allows: its rows are read and written in long runs.
    let (_, nr) = engine.unit.run(TileShape);
    let (nr, threads) = (if out.cols() <= LANES { LANES } else { nr }, rayon::current_num_threads());
    let across = Parts::new(out.cols(), nr, NC * KC / deepest.max(1), threads);
    let rows = if across.count() < threads { FEW_ROWS } else { ROWS };
    let down = Parts::new(out.rows(), left.mr, rows, 1);
    let blocks = if O::DTYPE == DType::F32 || depth <= deepest { 0 } else { down.longest() * across.longest() };
    let len = across.longest() * deepest;
    engine.scratch.reserve(threads.min(down.count() * across.count()), len + blocks)?;
    out.for_each_block(down, across, |block| {
        let mut memory = engine.scratch.take(len + blocks)?;
        let (right, sums) = memory.split_at_mut(len);
        engine.unit.run(Strip { block, init, terms, left, right, sums, nr });
        Ok(())
    })
}

/// Where a block of the depth that begins at `start` ends. Each term is cut into equal blocks of at most `KC`; short terms
/// join the block before them.
fn block_end<E>(terms: &[Product<'_, E>], start: usize) -> usize {
    let mut end = 0;
    for term in terms {
        let (first, depth) = (end, term.depth());
        end += depth;
        if start < end || (start == first && depth == 0) {
            let step = depth.div_ceil(depth.div_ceil(KC).max(1));
            let cut = first + ((start - first) / step.max(1) + 1) * step;
            if cut < end {
                return cut;
            }
            break;
        }
    }
    let mut total = 0;
    for term in terms {
        let joins = total == end && term.depth() <= SHORT;
        total += term.depth();
        end = if joins { total } else { end };
    }
    end
}

/// The steps in the longest block of the depth.
fn deepest<E>(terms: &[Product<'_, E>]) -> usize {
    let (mut start, mut deepest) = (0, 0);
    let depth = terms.iter().map(Product::depth).sum();
    while start < depth {
        let end = block_end(terms, start);
        (start, deepest) = (end, deepest.max(end - start));
    }
    deepest
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
    let depth: usize = terms.iter().map(Product::depth).sum();
    let mut start = 0;
    loop {
        let within = start..block_end(terms, start);
        if !within.is_empty() {
            let panels = right.chunks_exact_mut(nr * within.len());
            for (to, first) in panels.zip(block.cols.clone().step_by(nr)) {
                Panel { side: Side::Right, terms, depth: within.clone(), first, width: nr, to }.run(s);
            }
        }
        let init = if start == 0 { init } else { Init::Output };
        if S::NV == 2 && nr == 2 * LANES {
            tiles::<S, E, O, 2>(s, block, init, &within, left, right);
        } else {
            tiles::<S, E, O, 1>(s, block, init, &within, left, right);
        }
        start = within.end;
        if start == depth {
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
    for i in (0..height).step_by(mr) {
        let left = left.panel((block.rows.start + i) / mr, within);
        for j in (0..width).step_by(nr) {
            let (rows, cols) = (i..height.min(i + mr), j..width.min(j + nr));
            for row in rows.clone() {
                s.prefetch(&block.line(row)[cols.clone()]);
            }
            s.tile::<NV>(left, &right[j * within.len()..][..nr * within.len()], &mut tile);
            for (row, sums) in rows.zip(tile.chunks_exact(NV)) {
                super::finish(s, sums, init, col + j, &mut block.line(row)[cols.clone()]);
            }
        }
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

    fn cuts(depths: &[usize]) -> Vec<usize> {
        let numbers = vec![0f32; depths.iter().sum()];
        let product = |&depth: &usize| {
            let line = Factor::Stored(Matrix::new(&numbers[..depth], 1, depth));
            Product { scale: 1.0, lhs: line, rhs: Factor::Stored(Matrix::new(&numbers[..depth], depth, 1)) }
        };
        let terms: Vec<Product<'_, f32>> = depths.iter().map(product).collect();
        let mut cuts = vec![0];
        while cuts.last() < Some(&depths.iter().sum()) {
            cuts.push(block_end(&terms, cuts[cuts.len() - 1]));
        }
        assert!(cuts.windows(2).all(|cut| cut[1] - cut[0] <= deepest(&terms)));
        cuts
    }

    #[test]
    fn short_terms_join_the_block_before_them() {
        assert_eq!(cuts(&[1024]), [0, 342, 684, 1024]);
        assert_eq!(cuts(&[1024, 16]), [0, 342, 684, 1040]);
        assert_eq!(cuts(&[16, 1024]), [0, 16, 358, 700, 1040]);
        assert_eq!(cuts(&[1024, 129]), [0, 342, 684, 1024, 1153]);
        assert_eq!(cuts(&[0, 7]), [0, 7]);
        assert_eq!(cuts(&[7, 0]), [0, 7]);
    }

    proptest! {
        /// So the sum over `W` is made in the same order with an adapter and without, and every block fits what is packed.
        #[test]
        fn a_second_term_does_not_move_the_cuts_of_the_first(k in 1usize..3000, r in 0usize..600) {
            let (alone, both) = (cuts(&[k]), cuts(&[k, r]));
            prop_assert_eq!(&alone[..alone.len() - 1], &both[..alone.len() - 1]);
            prop_assert!(both.windows(2).all(|cut| cut[0] < cut[1] && cut[1] - cut[0] <= KC + SHORT));
        }
    }
}
