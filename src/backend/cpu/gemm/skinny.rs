//! The skinny regime: the output has few rows, so most of the time goes into reading the right side, the weight, once. Only the
//! left side is packed.
//!
//! ```text
//! pack the left side of each term
//! for each block of columns                            (parallel)
//!   sums[rows × columns] = 0, in f32, in L1
//!   for each term
//!     K-major weight (x·Wᵀ):  sums[i][j] += dot product of row i of x and row j of W       (dots.rs)
//!     N-major weight (dy·W):  sums[i]    += dy[i][p] · row p of W, for each p              (axpy.rs)
//!   output = init + sums, rounded once
//! ```

use std::ops::Range;

use super::super::Engine;
use super::super::scratch::ScratchGuard;
use super::super::simd::{Kernel, LANES, Lanes, Simd};
use super::micro::Fma;
use super::pack::{Interleave, Panels, Side};
use super::plan::{self, AXPY_SUMS, DOT_COLS, DOT_ROWS, QUANTISED_COLS, SKINNY_ROWS};
use super::{Block, Factor, Init, Matrix, Output, Parts, Product, QuantMatrix, narrow};
use crate::element::Float;
use crate::error::Result;

/// The most vectors of sums of a block of dot products.
const DOT_SUMS: usize = DOT_ROWS * DOT_COLS / LANES;
/// Vectors of sums of a block of a few rows.
const FEW_SUMS: usize = DOT_SUMS / 4;

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
        let (rhs, depth) = (narrow::transposed(engine, term.rhs)?, term.depth());
        let rhs = Factor::F32(Matrix::new(&rhs, out.cols(), depth).t());
        return run(engine, out, init, &[Product { rhs, ..*term }]);
    }
    let left = |i: usize| terms.get(i).map(|term| pack_left(engine, term)).transpose();
    let lefts = [left(0)?, left(1)?];
    let dots = terms.iter().any(|term| term.rhs.transposed());
    let down = Parts::new(out.rows(), SKINNY_ROWS, SKINNY_ROWS, 1);
    let height = down.longest().min(out.rows());
    let width = if dots { DOT_COLS } else { plan::axpy_cols(engine.unit.run(Registers), height, out.cols(), engine.threads()) };
    let dequantises = terms.iter().any(|term| matches!(term.rhs, Factor::Quantised(_)));
    let width = if dequantises { width.min(QUANTISED_COLS) } else { width };
    let across = Parts::new(out.cols(), LANES, width, 1);
    let depth = terms.iter().map(Product::depth).sum();
    out.for_each_block(engine, down, across, depth, |out| {
        // The array has to be zeroed, so it is not much longer than the sums.
        let vectors = out.rows().len() * out.cols().len().div_ceil(LANES);
        if vectors <= FEW_SUMS {
            block(engine, out, init, terms, &lefts, &mut Aligned([[0.0; LANES]; FEW_SUMS]).0);
        } else if vectors <= DOT_SUMS {
            block(engine, out, init, terms, &lefts, &mut Aligned([[0.0; LANES]; DOT_SUMS]).0);
        } else {
            block(engine, out, init, terms, &lefts, &mut Aligned([[0.0; LANES]; AXPY_SUMS / LANES]).0);
        }
        Ok(())
    })
}

/// True if the right side is N-major with fewer columns than a vector has lanes, and the depth is longer: its transpose has
/// long rows.
fn is_narrow<E: Float>(term: &Product<'_, E>) -> bool {
    !term.rhs.transposed() && !term.lhs.transposed() && term.rhs.cols() < LANES && term.depth() >= LANES
}

/// Packs the left side: for dot products as groups of [interleaved](Interleave) rows, otherwise as one panel of all rows,
/// multiplied by the scale.
fn pack_left<'e, E: Float>(engine: &'e Engine, term: &Product<'_, E>) -> Result<ScratchGuard<'e>> {
    let (unit, rows, depth) = (engine.unit, term.lhs.rows(), term.depth());
    if !term.rhs.transposed() {
        let mut left = engine.scratch.take(rows * depth)?;
        if !left.is_empty() {
            let (terms, stride) = (&[*term], rows * depth);
            Panels { micro: Fma, side: Side::Left, terms, depth: 0..depth, first: 0, width: rows, stride, to: &mut left }
                .pack(unit);
            left.iter_mut().for_each(|number| *number *= term.scale);
        }
        return Ok(left);
    }
    let width = plan::dot_rows(unit.run(Registers), rows);
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

/// The number of vectors that the registers of the unit hold.
struct Registers;

impl Kernel for Registers {
    type Out = usize;
    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> usize {
        S::REGISTERS
    }
}

/// Sums in whole cache lines, so that no vector crosses one.
#[repr(align(64))]
struct Aligned<const N: usize>([Lanes<f32>; N]);

/// One block of the output. The loops over the weight are kernels of their own, which do not depend on the element type of the
/// output: they are large, and compiled for every vector unit.
fn block<E: Float, O: Float>(
    engine: &Engine,
    block: Block<'_, O>,
    init: Init<'_, E>,
    terms: &[Product<'_, E>],
    lefts: &[Option<ScratchGuard<'_>>; 2],
    lanes: &mut [Lanes<f32>],
) {
    let mut sums = Sums::new(lanes, block.rows().len(), block.cols());
    for (term, left) in terms.iter().zip(lefts.iter().flatten()) {
        let (sums, scale) = (&mut sums, term.scale);
        match term.rhs {
            Factor::Elem(rhs) => engine.unit.run(AddProduct { sums, scale, left, rhs }),
            Factor::F32(rhs) => engine.unit.run(AddProduct { sums, scale, left, rhs }),
            Factor::Quantised(rhs) => engine.unit.run(AddQuantised { sums, scale, left, rhs }),
        }
    }
    engine.unit.run(Finish { sums, block, init });
}

/// `sums += scale·left·rhs`
struct AddProduct<'a, 's, R> {
    sums: &'a mut Sums<'s>,
    scale: f32,
    left: &'a [f32],
    rhs: Matrix<'a, R>,
}

impl<R: Float> Kernel for AddProduct<'_, '_, R> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { sums: Sums { lanes, height, vectors, first, width }, scale, left, rhs } = self;
        // A copy of the sizes, which stores to the sums cannot change, so that they stay in registers.
        let mut sums = Sums { lanes, height: *height, vectors: *vectors, first: *first, width: *width };
        if rhs.transposed { sums.add_dots(s, scale, left.as_chunks().0, rhs) } else { sums.add_scaled_rows(s, left, rhs) }
    }
}

/// `sums += scale·left·rhs`, the right side quantised
struct AddQuantised<'a, 's> {
    sums: &'a mut Sums<'s>,
    scale: f32,
    left: &'a [f32],
    rhs: QuantMatrix<'a>,
}

impl Kernel for AddQuantised<'_, '_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.sums.add_quantised(s, self.scale, self.left, self.rhs);
    }
}

/// `output = init + sums`, rounded once
struct Finish<'s, 'o, 'a, E, O> {
    sums: Sums<'s>,
    block: Block<'o, O>,
    init: Init<'a, E>,
}

impl<E: Float, O: Float> Kernel for Finish<'_, '_, '_, E, O> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        for (i, sums) in self.sums.lanes.chunks_exact(self.sums.vectors).enumerate() {
            super::finish(s, sums, self.init, self.block.cols().start, self.block.line(i));
        }
    }
}

/// The sums of a block of columns, row by row, each row filled up to whole vectors.
pub(super) struct Sums<'s> {
    pub(super) lanes: &'s mut [Lanes<f32>],
    pub(super) height: usize,
    pub(super) vectors: usize,
    /// First column of the block in the output.
    pub(super) first: usize,
    pub(super) width: usize,
}

impl<'s> Sums<'s> {
    fn new(lanes: &'s mut [Lanes<f32>], height: usize, cols: Range<usize>) -> Self {
        let vectors = cols.len().div_ceil(LANES);
        Self { lanes: &mut lanes[..height * vectors], height, vectors, first: cols.start, width: cols.len() }
    }
}
