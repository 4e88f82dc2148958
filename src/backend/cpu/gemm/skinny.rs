//! Few rows: the left side is small, and the work is to read the right side once. Nothing is packed.
//!
//! The weights are contiguous either along the depth (`x·Wᵀ`: each output is a dot product) or along the output (`dy·W`:
//! each row of `W`, times a number, is added to the output). A task owns a block of columns and sums it in `f32` beside the
//! output, through all terms, before it rounds.

use rayon::prelude::*;

use super::super::simd::{Kernel, LANES, Lanes, Simd, Unit};
use super::{Block, Factor, Init, Matrix, Output, Product, SKINNY_ROWS};
use crate::element::Float;

/// Columns a task owns where the weights are contiguous along them: the sums (10·512 floats, 20 KiB) stay in L1.
const WIDTH: usize = 512;
/// Columns a task owns where each is a row of the weights to be read whole.
const DOTS: usize = 64;
/// Rows of weights read side by side: as many streams as the prefetcher follows, and so many uses of each sum loaded.
const STREAMS: usize = 8;

/// `out = init + Σ scale·lhs·rhs`
pub(super) fn run<E: Float, O: Float>(unit: Unit, out: Output<'_, O>, init: Init<'_, E>, terms: &[Product<'_, E>]) {
    let dots = terms.iter().any(|term| term.rhs.transposed());
    let (height, width) = (out.rows.max(1), if dots { DOTS } else { WIDTH });
    let task = |block| unit.run(Columns { block, init, terms });
    out.into_blocks(height, width).into_par_iter().for_each(task);
}

struct Columns<'a, 'o, E, O> {
    block: Block<'o, O>,
    init: Init<'a, E>,
    terms: &'a [Product<'a, E>],
}

impl<E: Float, O: Float> Kernel for Columns<'_, '_, E, O> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut sums = Sums::new(self.block.lines.len(), self.block.col, self.block.width());
        for term in self.terms {
            match (term.lhs, term.rhs) {
                (Factor::Stored(lhs), Factor::Stored(rhs)) => sums.add_product(s, term.scale, lhs, rhs),
                (Factor::Stored(lhs), Factor::Wide(rhs)) => sums.add_product(s, term.scale, lhs, rhs),
                (Factor::Wide(lhs), Factor::Stored(rhs)) => sums.add_product(s, term.scale, lhs, rhs),
                (Factor::Wide(lhs), Factor::Wide(rhs)) => sums.add_product(s, term.scale, lhs, rhs),
            }
        }
        for (line, sums) in self.block.lines.into_iter().zip(sums.lanes.chunks_exact(sums.vectors)) {
            super::finish(s, sums, self.init, self.block.col, line);
        }
    }
}

/// The sums of a block of columns, each line a whole number of vectors.
struct Sums {
    lanes: Vec<Lanes<f32>>,
    vectors: usize,
    first: usize,
    width: usize,
}

impl Sums {
    fn new(height: usize, first: usize, width: usize) -> Self {
        let vectors = width.div_ceil(LANES);
        Self { lanes: vec![[0.0; LANES]; height * vectors], vectors, first, width }
    }

    /// `sums += scale·lhs·rhs`
    #[inline(always)]
    fn add_product<S: Simd, L: Float, R: Float>(&mut self, s: S, scale: f32, lhs: Matrix<'_, L>, rhs: Matrix<'_, R>) {
        match (rhs.transposed, S::REGISTERS) {
            (true, 32..) => self.add_dots::<S, L, R, 5, 4>(s, scale, lhs, rhs),
            (true, _) => self.add_dots::<S, L, R, 2, 2>(s, scale, lhs, rhs),
            (false, _) => {
                let whole = lhs.cols / STREAMS * STREAMS;
                self.add_lines::<S, L, R, STREAMS>(s, scale, lhs, rhs, 0, whole);
                self.add_lines::<S, L, R, 1>(s, scale, lhs, rhs, whole, lhs.cols);
            }
        }
    }

    /// Dot products of X lines on the left with W on the right at a time: X·W sums for X + W loads.
    #[inline(always)]
    fn add_dots<S: Simd, L: Float, R: Float, const X: usize, const W: usize>(
        &mut self,
        s: S,
        scale: f32,
        lhs: Matrix<'_, L>,
        rhs: Matrix<'_, R>,
    ) {
        for j in (0..self.width).step_by(W) {
            for i in (0..lhs.rows).step_by(X) {
                // At an edge the last line is taken again, and what it gives is not kept.
                let left: [&[L]; X] = std::array::from_fn(|x| lhs.run((i + x).min(lhs.rows - 1)));
                let right: [&[R]; W] = std::array::from_fn(|w| rhs.run(self.first + (j + w).min(self.width - 1)));
                let dots = dots(s, left, right);
                for x in 0..X.min(lhs.rows - i) {
                    for w in 0..W.min(self.width - j) {
                        let sums = &mut self.lanes[(i + x) * self.vectors..];
                        sums[(j + w) / LANES][(j + w) % LANES] += scale * dots[x][w];
                    }
                }
            }
        }
    }

    /// `sums[i] += scale·Σ_p lhs[i][p]·rhs[p]` for p in `start..end`, P at a time.
    #[inline(always)]
    fn add_lines<S: Simd, L: Float, R: Float, const P: usize>(
        &mut self,
        s: S,
        scale: f32,
        lhs: Matrix<'_, L>,
        rhs: Matrix<'_, R>,
        start: usize,
        end: usize,
    ) {
        for p in (start..end).step_by(P) {
            let mut factors = [[0.0; P]; SKINNY_ROWS];
            for i in 0..lhs.rows {
                for q in 0..P {
                    factors[i][q] = scale * lhs.run(i)[p + q].to_f32();
                }
            }
            let lines: [&[R]; P] = std::array::from_fn(|q| &rhs.run(p + q)[self.first..][..self.width]);
            for v in 0..self.vectors {
                let mut vectors = [s.splat(0.0); P];
                for q in 0..P {
                    vectors[q] = s.widen_at(lines[q], v);
                }
                for i in 0..lhs.rows {
                    let to = &mut self.lanes[i * self.vectors + v];
                    let mut sum = s.load(to);
                    for q in 0..P {
                        sum = s.mul_add(s.splat(factors[i][q]), vectors[q], sum);
                    }
                    s.store(sum, to);
                }
            }
        }
    }
}

/// `dots[x][w] = left[x] · right[w]`
#[inline(always)]
fn dots<S: Simd, L: Float, R: Float, const X: usize, const W: usize>(s: S, left: [&[L]; X], right: [&[R]; W]) -> [[f32; W]; X] {
    let mut sums = [[s.splat(0.0); W]; X];
    for v in 0..left[0].len().div_ceil(LANES) {
        let mut weights = [s.splat(0.0); W];
        for w in 0..W {
            weights[w] = s.widen_at(right[w], v);
        }
        for x in 0..X {
            let numbers = s.widen_at(left[x], v);
            for w in 0..W {
                sums[x][w] = s.mul_add(numbers, weights[w], sums[x][w]);
            }
        }
    }
    let mut dots = [[0.0; W]; X];
    for x in 0..X {
        for w in 0..W {
            dots[x][w] = s.sum(sums[x][w]);
        }
    }
    dots
}
