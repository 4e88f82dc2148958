//! Few rows: the left side is small, and the work is to read the right side once. Only the left side is packed.
//!
//! The weights are contiguous either along the depth (`x·Wᵀ`: each output is a dot product) or along the output (`dy·W`:
//! each row of `W`, times a number, is added to the output). A task owns a block of columns and sums it in `f32` beside the
//! output, through all terms, before it rounds.

use std::ops::Range;

use super::super::Engine;
use super::super::scratch::ScratchGuard;
use super::super::simd::{Kernel, LANES, Lanes, Simd};
use super::micro::Fma;
use super::pack::{Interleave, Panels, Side};
use super::plan::{self, DOT_ROWS, DOTS, QUANTISED_COLS, SKINNY_ROWS, SUMS};
use super::{Block, Factor, Init, Matrix, Output, Parts, Product, narrow};
use crate::element::Float;
use crate::error::Result;

/// `out = init + Σ scale·lhs·rhs`
pub(super) fn run<E: Float, O: Float>(
    engine: &Engine,
    out: Output<'_, O>,
    init: Init<'_, E>,
    terms: &[Product<'_, E>],
) -> Result<()> {
    if let [term] = terms
        && is_narrow(term)
    {
        let (rhs, depth) = (narrow::turned(engine, term.rhs)?, term.depth());
        let rhs = Factor::F32(Matrix::new(&rhs, out.cols(), depth).t());
        return run(engine, out, init, &[Product { rhs, ..*term }]);
    }
    let left = |i: usize| terms.get(i).map(|term| pack_left(engine, term)).transpose();
    let lefts = [left(0)?, left(1)?];
    let dots = terms.iter().any(|term| term.rhs.transposed());
    let down = Parts::new(out.rows(), SKINNY_ROWS, SKINNY_ROWS, 1);
    let height = down.longest().min(out.rows());
    let width = if dots { DOTS } else { plan::run(engine.unit.run(Registers), height, out.cols(), engine.threads()) };
    let widened = terms.iter().any(|term| matches!(term.rhs, Factor::Quantised(_)));
    let width = if widened { width.min(QUANTISED_COLS) } else { width };
    let across = Parts::new(out.cols(), LANES, width, 1);
    let depth = terms.iter().map(Product::depth).sum();
    out.for_each_block(engine, down, across, depth, |block| {
        engine.unit.run(Columns { block, init, terms, lefts: &lefts });
        Ok(())
    })
}

/// Whether the lines of the right side are shorter than a vector, and dot products are long.
fn is_narrow<E: Float>(term: &Product<'_, E>) -> bool {
    !term.rhs.transposed() && !term.lhs.transposed() && term.rhs.cols() < LANES && term.depth() >= LANES
}

/// The left side: for dot products interleaved, a group of lines after the other, else a panel with all rows side by side,
/// multiplied with the scale.
fn pack_left<'e, E: Float>(engine: &'e Engine, term: &Product<'_, E>) -> Result<ScratchGuard<'e>> {
    let (unit, rows, depth) = (engine.unit, term.lhs.rows(), term.depth());
    if !term.rhs.transposed() {
        let mut left = engine.scratch.take(rows * depth)?;
        if !left.is_empty() {
            let (terms, stride) = (&[*term], rows * depth);
            unit.run(Panels {
                micro: Fma,
                side: Side::Left,
                terms,
                depth: 0..depth,
                first: 0,
                width: rows,
                stride,
                to: &mut left,
            });
            left.iter_mut().for_each(|number| *number *= term.scale);
        }
        return Ok(left);
    }
    let width = plan::together(unit.run(Registers), rows);
    let group = width * depth.next_multiple_of(LANES);
    let mut left = engine.scratch.take(rows.div_ceil(width) * group)?;
    for (first, to) in (0..rows).step_by(width).zip(left.chunks_exact_mut(group.max(1))) {
        let to = to.as_chunks_mut().0;
        match term.lhs {
            Factor::Elem(lines) => unit.run(Interleave { lines, first, width, to }),
            Factor::F32(lines) => unit.run(Interleave { lines, first, width, to }),
            Factor::Quantised(_) => {} // a weight is never on the left of dot products
        }
    }
    if let Factor::Quantised(w) = term.rhs {
        w.reorder_left(rows, &mut left);
    }
    Ok(left)
}

/// How many vectors the unit's registers hold.
struct Registers;

impl Kernel for Registers {
    type Out = usize;
    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> usize {
        S::REGISTERS
    }
}

struct Columns<'a, 'o, E, O> {
    block: Block<'o, O>,
    init: Init<'a, E>,
    terms: &'a [Product<'a, E>],
    lefts: &'a [Option<ScratchGuard<'a>>; 2],
}

impl<E: Float, O: Float> Kernel for Columns<'_, '_, E, O> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        // Dot products have fewer columns: what is not there need not be zeroed.
        if self.block.rows().len() * self.block.cols().len().div_ceil(LANES) <= DOT_ROWS * DOTS / LANES {
            self.sum(s, &mut [[0.0; LANES]; DOT_ROWS * DOTS / LANES]);
        } else {
            self.sum(s, &mut [[0.0; LANES]; SUMS / LANES]);
        }
    }
}

impl<E: Float, O: Float> Columns<'_, '_, E, O> {
    #[inline(always)]
    fn sum<S: Simd>(&mut self, s: S, lanes: &mut [Lanes<f32>]) {
        let mut sums = Sums::new(lanes, self.block.rows().len(), self.block.cols());
        for (term, left) in self.terms.iter().zip(self.lefts.iter().flatten()) {
            match term.rhs {
                Factor::Elem(rhs) => sums.add_product(s, term.scale, left, rhs),
                Factor::F32(rhs) => sums.add_product(s, term.scale, left, rhs),
                Factor::Quantised(rhs) => sums.add_quantised(s, term.scale, left, rhs),
            }
        }
        for (i, sums) in sums.lanes.chunks_exact(sums.vectors).enumerate() {
            super::finish(s, sums, self.init, self.block.cols().start, self.block.line(i));
        }
    }
}

/// The sums of a block of columns, each line a whole number of vectors.
pub(super) struct Sums<'s> {
    pub(super) lanes: &'s mut [Lanes<f32>],
    pub(super) height: usize,
    pub(super) vectors: usize,
    /// Which column of the output is the first.
    pub(super) first: usize,
    pub(super) width: usize,
}

impl<'s> Sums<'s> {
    fn new(lanes: &'s mut [Lanes<f32>], height: usize, cols: Range<usize>) -> Self {
        let vectors = cols.len().div_ceil(LANES);
        Self { lanes: &mut lanes[..height * vectors], height, vectors, first: cols.start, width: cols.len() }
    }

    /// `sums += scale·left·rhs`
    #[inline(always)]
    fn add_product<S: Simd, R: Float>(&mut self, s: S, scale: f32, left: &[f32], rhs: Matrix<'_, R>) {
        if rhs.transposed { self.add_dots(s, scale, left.as_chunks().0, rhs) } else { self.add_lines(s, left, rhs) }
    }
}
