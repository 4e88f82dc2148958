//! Few rows: the left side is small, and the work is to read the right side once. Only the left side is packed.
//!
//! The weights are contiguous either along the depth (`x·Wᵀ`: each output is a dot product) or along the output (`dy·W`:
//! each row of `W`, times a number, is added to the output). A task owns a block of columns and sums it in `f32` beside the
//! output, through all terms, before it rounds.

use std::ops::Range;

use super::super::Engine;
use super::super::scratch::Taken;
use super::super::simd::{Kernel, LANES, Lanes, Simd};
use super::micro::Fma;
use super::pack::{Interleave, Panels, Side};
use super::{Block, DOT_ROWS, Factor, Init, Matrix, Output, Parts, Product, SKINNY_ROWS};
use crate::element::Float;
use crate::error::Result;

/// Columns a task owns where the weights are contiguous along them: the sums (10·512 floats, 20 KiB) stay in L1.
const WIDTH: usize = 512;
/// Columns a task owns where each is a row of the weights to be read whole.
const DOTS: usize = 64;
/// Numbers of the left side that stay in L1 (20 KiB) while dot products are made with them.
const STAYS: usize = 5 * 1024;
/// Rows of weights read side by side: as many streams as the prefetcher follows, and so many uses of each sum loaded.
const STREAMS: usize = 8;
/// Rows of weights in a block of dot products.
const ACROSS: usize = 4;

/// `out = init + Σ scale·lhs·rhs`
pub(super) fn run<E: Float, O: Float>(
    engine: &Engine,
    out: Output<'_, O>,
    init: Init<'_, E>,
    terms: &[Product<'_, E>],
) -> Result<()> {
    let left = |i: usize| terms.get(i).map(|term| pack_left(engine, term)).transpose();
    let lefts = [left(0)?, left(1)?];
    let dots = terms.iter().any(|term| term.rhs.transposed());
    let across = Parts::new(out.cols(), LANES, if dots { DOTS } else { WIDTH }, 1);
    let down = Parts::new(out.rows(), SKINNY_ROWS, SKINNY_ROWS, 1);
    out.for_each_block(down, across, |block| {
        engine.unit.run(Columns { block, init, terms, lefts: &lefts });
        Ok(())
    })
}

/// Lines of the left side that a block of dot products takes: 5·4 sums + 4 weights leave room in 32 registers.
fn down(rows: usize, registers: usize) -> usize {
    match registers {
        _ if rows == 1 => 1,
        32.. => 5,
        _ => 2,
    }
}

/// The left side: interleaved for dot products, else a panel with all rows side by side.
fn pack_left<'e, E: Float>(engine: &'e Engine, term: &Product<'_, E>) -> Result<Taken<'e>> {
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
        }
        return Ok(left);
    }
    let width = rows.next_multiple_of(down(rows, unit.run(Registers)));
    let mut left = engine.scratch.take(width * depth.next_multiple_of(LANES))?;
    if width > 0 {
        let to = left.as_chunks_mut().0;
        match term.lhs {
            Factor::Stored(lines) => unit.run(Interleave { lines, width, to }),
            Factor::Wide(lines) => unit.run(Interleave { lines, width, to }),
        }
    }
    Ok(left)
}

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
    lefts: &'a [Option<Taken<'a>>; 2],
}

impl<E: Float, O: Float> Kernel for Columns<'_, '_, E, O> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        // Dot products have fewer columns: what is not there need not be zeroed.
        if self.block.rows.len() * self.block.cols.len().div_ceil(LANES) <= DOT_ROWS * DOTS / LANES {
            self.sum(s, &mut [[0.0; LANES]; DOT_ROWS * DOTS / LANES]);
        } else {
            self.sum(s, &mut [[0.0; LANES]; SKINNY_ROWS * WIDTH / LANES]);
        }
    }
}

impl<E: Float, O: Float> Columns<'_, '_, E, O> {
    #[inline(always)]
    fn sum<S: Simd>(&mut self, s: S, lanes: &mut [Lanes<f32>]) {
        let mut sums = Sums::new(lanes, self.block.rows.len(), self.block.cols.clone());
        for (term, left) in self.terms.iter().zip(self.lefts.iter().flatten()) {
            match term.rhs {
                Factor::Stored(rhs) => sums.add_product(s, term.scale, left, rhs),
                Factor::Wide(rhs) => sums.add_product(s, term.scale, left, rhs),
            }
        }
        for (i, sums) in sums.lanes.chunks_exact(sums.vectors).enumerate() {
            super::finish(s, sums, self.init, self.block.cols.start, self.block.line(i));
        }
    }
}

/// The sums of a block of columns, each line a whole number of vectors.
struct Sums<'s> {
    lanes: &'s mut [Lanes<f32>],
    height: usize,
    vectors: usize,
    first: usize,
    width: usize,
}

impl<'s> Sums<'s> {
    fn new(lanes: &'s mut [Lanes<f32>], height: usize, cols: Range<usize>) -> Self {
        let vectors = cols.len().div_ceil(LANES);
        Self { lanes: &mut lanes[..height * vectors], height, vectors, first: cols.start, width: cols.len() }
    }

    /// `sums += scale·left·rhs`
    #[inline(always)]
    fn add_product<S: Simd, R: Float>(&mut self, s: S, scale: f32, left: &[f32], rhs: Matrix<'_, R>) {
        if !rhs.transposed {
            let whole = rhs.rows / STREAMS * STREAMS;
            self.add_lines::<S, R, STREAMS>(s, scale, &left[..whole * self.height], rhs, 0);
            return self.add_lines::<S, R, 1>(s, scale, &left[whole * self.height..], rhs, whole);
        }
        let left = left.as_chunks().0;
        match down(self.height, S::REGISTERS) {
            _ if rhs.rows == 0 => {}
            _ if rhs.rows < LANES => self.add_short_dots(scale, left, rhs),
            1 => self.add_dots::<S, R, 1>(s, scale, left, rhs),
            2 => self.add_dots::<S, R, 2>(s, scale, left, rhs),
            _ => self.add_dots::<S, R, 5>(s, scale, left, rhs),
        }
    }

    /// Dot products of X lines on the left with `ACROSS` on the right at a time: X·ACROSS sums for X + ACROSS loads. A stretch
    /// of the left side stays in L1 while the right side goes by.
    #[inline(always)]
    fn add_dots<S: Simd, R: Float, const X: usize>(&mut self, s: S, scale: f32, left: &[Lanes<f32>], rhs: Matrix<'_, R>) {
        let width = self.height.next_multiple_of(X);
        let stretch = (STAYS / width).next_multiple_of(LANES);
        for (left, start) in left.chunks(width * stretch / LANES).zip((0..rhs.rows).step_by(stretch)) {
            let depth = start..rhs.rows.min(start + stretch);
            for j in (0..self.width).step_by(ACROSS) {
                // At an edge the last line is taken again, and what it gives is not kept.
                let line = |w: usize| &rhs.run(self.first + (j + w).min(self.width - 1))[depth.clone()];
                let right: [&[R]; ACROSS] = std::array::from_fn(line);
                for i in (0..self.height).step_by(X) {
                    let dots = dots::<S, R, X>(s, left, width, i, right);
                    for x in 0..X.min(self.height - i) {
                        for w in 0..ACROSS.min(self.width - j) {
                            *self.at(i + x, j + w) += scale * dots[x][w];
                        }
                    }
                }
            }
        }
    }

    /// Dot products too short for vectors, as those over the rank of an adapter often are.
    fn add_short_dots<R: Float>(&mut self, scale: f32, left: &[Lanes<f32>], rhs: Matrix<'_, R>) {
        for i in 0..self.height {
            for j in 0..self.width {
                let pairs = left[i].iter().zip(rhs.run(self.first + j));
                *self.at(i, j) += scale * pairs.fold(0.0, |sum, (x, w)| sum + x * w.to_f32());
            }
        }
    }

    #[inline(always)]
    fn at(&mut self, i: usize, j: usize) -> &mut f32 {
        &mut self.lanes[i * self.vectors + j / LANES][j % LANES]
    }

    /// `sums[i] += Σ_p scale·left[p][i]·rhs[start + p]`, P lines of the right side at a time.
    #[inline(always)]
    fn add_lines<S: Simd, R: Float, const P: usize>(&mut self, s: S, scale: f32, left: &[f32], rhs: Matrix<'_, R>, start: usize) {
        for (block, left) in left.chunks_exact(P * self.height).enumerate() {
            let line = |q: usize| &rhs.run(start + block * P + q)[self.first..][..self.width];
            let lines: [&[R]; P] = std::array::from_fn(line);
            let whole = self.width / LANES;
            let lanes = lines.map(|line| &line.as_chunks::<LANES>().0[..whole]);
            let mut factors = [[0.0; P]; SKINNY_ROWS];
            for (i, factors) in factors[..self.height].iter_mut().enumerate() {
                for q in 0..P {
                    factors[q] = scale * left[q * self.height + i];
                }
            }
            let mut vectors = [s.splat(0.0); P];
            for v in 0..whole {
                for q in 0..P {
                    vectors[q] = s.widen(&lanes[q][v]);
                }
                self.add_vectors(s, v, &factors, &vectors);
            }
            if whole < self.vectors {
                for q in 0..P {
                    vectors[q] = s.widen_at(lines[q], whole);
                }
                self.add_vectors(s, whole, &factors, &vectors);
            }
        }
    }

    /// `sums[i][v] += Σ_q factors[i][q]·vectors[q]`
    #[inline(always)]
    fn add_vectors<S: Simd, const P: usize>(&mut self, s: S, v: usize, factors: &[[f32; P]], vectors: &[S::V; P]) {
        for (factors, to) in factors.iter().zip(self.lanes[v..].iter_mut().step_by(self.vectors)) {
            let mut sum = s.load(to);
            for q in 0..P {
                sum = s.mul_add(s.splat(factors[q]), vectors[q], sum);
            }
            s.store(sum, to);
        }
    }
}

/// `dots[x][w] = left[i + x] · right[w]`
#[inline(always)]
fn dots<S: Simd, R: Float, const X: usize>(
    s: S,
    left: &[Lanes<f32>],
    width: usize,
    i: usize,
    right: [&[R]; ACROSS],
) -> [[f32; ACROSS]; X] {
    let mut sums = [[s.splat(0.0); ACROSS]; X];
    let mut weights = [s.splat(0.0); ACROSS];
    let whole = right[0].len() / LANES;
    let lanes = right.map(|line| &line.as_chunks::<LANES>().0[..whole]);
    for (v, left) in left.chunks_exact(width).enumerate() {
        let Some(numbers) = left[i..].first_chunk::<X>() else { break }; // never: i + X ≤ width
        for w in 0..ACROSS {
            weights[w] = if v < whole { s.widen(&lanes[w][v]) } else { s.widen_at(right[w], v) };
        }
        for x in 0..X {
            let number = s.load(&numbers[x]);
            for w in 0..ACROSS {
                sums[x][w] = s.mul_add(number, weights[w], sums[x][w]);
            }
        }
    }
    let mut dots = [[0.0; ACROSS]; X];
    for x in 0..X {
        for w in 0..ACROSS {
            dots[x][w] = s.sum(sums[x][w]);
        }
    }
    dots
}
