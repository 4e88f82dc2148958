//! The micro-kernel for `bf16` pairs (AMX, AVX-512 BF16): it packs panels of pairs, and splits an `h` in `f32` into three `bf16`.

use std::ops::Range;

use super::super::Engine;
use super::super::scratch::ScratchGuard;
use super::super::simd::pairs::{COLS, PairUnit, Ready, STEP};
use super::super::simd::{LANES, Lanes, Simd, Unit};
use super::micro::Micro;
use super::pack::{Part, Side};
use super::plan::KC_PAIRS;
use super::{Factor, Init, Matrix, Output, Product, blocked};
use crate::element::{Float, bf16};
use crate::error::Result;

/// The micro-kernel of a unit that multiplies pairs of `bf16`.
#[derive(Clone, Copy)]
pub(super) struct Pairs(PairUnit);

/// The unit for pairs in use, if there is one.
pub(super) fn unit(engine: &Engine) -> Option<Pairs> {
    engine.unit.pairs().map(Pairs)
}

/// `out = init + base + update` on a unit for pairs: `base` is a product of `bf16`, `update` is `scale·h·rhs` with `h` in `f32`.
pub(super) struct Sum<'a> {
    unit: Pairs,
    init: Init<'a, bf16>,
    base: Product<'a, bf16>,
    update: Option<(f32, Matrix<'a, f32>, Matrix<'a, bf16>)>,
}

impl<'a> Sum<'a> {
    /// The sum of these terms, if they have that form and there is such a unit.
    pub(super) fn of<E: Float>(engine: &Engine, init: Init<'a, E>, terms: &[Product<'a, E>]) -> Option<Self> {
        let (unit, (&base, rest)) = (unit(engine)?, terms.split_first()?);
        let update = match rest {
            [] => None,
            [Product { scale, lhs: Factor::F32(h), rhs: Factor::Elem(rhs) }] if !h.transposed && h.as_contiguous().is_some() => {
                Some((*scale, *h, rhs.as_bf16().filter(all_finite)?))
            }
            _ => return None,
        };
        match base {
            Product { scale: 1.0, lhs: Factor::Elem(lhs), rhs: Factor::Elem(rhs) } => {
                let base = Product { scale: 1.0, lhs: Factor::Elem(lhs.as_bf16()?), rhs: Factor::Elem(rhs.as_bf16()?) };
                Some(Self { unit, init: init.as_bf16()?, base, update })
            }
            _ => None,
        }
    }

    /// Computes the sum.
    pub(super) fn run<O: Float>(self, engine: &Engine, out: Output<'_, O>) -> Result<()> {
        let Self { unit, init, base, update } = self;
        let Some((scale, h, rhs)) = update else { return blocked::run(engine, unit, out, init, &[base]) };
        let mut split = Split::new(engine, h.rows, rhs)?;
        let numbers = h.as_contiguous().unwrap_or_default(); // `of` takes no other
        blocked::run(engine, unit, out, init, &[base, split.update(scale, numbers, 0..h.rows)])
    }
}

impl Micro for Pairs {
    type Number = bf16;
    type Ready = Ready;
    const STEP: usize = STEP;
    const DEPTH: usize = KC_PAIRS;
    const F32: bool = false;

    fn shape(self, _: Unit, _: usize) -> (usize, usize) {
        (self.0.rows(), COLS)
    }

    /// Packs the layout of [`simd::pairs`](super::super::simd::pairs). The depth of a term is filled up with zeros.
    #[inline(always)]
    fn pack<S: Simd, T: Float>(self, s: S, side: Side, part: Part<'_, bf16>, lines: Matrix<'_, T>, scale: f32) {
        let Some(lines) = lines.as_bf16().filter(|_| scale == 1.0) else {
            return part.to.fill(bf16::NAN); // unreachable: `Sum` and `Split` make such terms only
        };
        let Part { depth, first, width, stride, to } = part;
        for (panel, to) in to.chunks_mut(stride.max(1)).enumerate() {
            let first = first + panel * width;
            for (to, step) in to.chunks_exact_mut(width * STEP).zip(depth.clone().step_by(STEP)) {
                let steps = step..lines.cols.min(step + STEP);
                match (side, lines.transposed) {
                    (Side::Left, false) => copy_rows(lines, first, steps, to),
                    (Side::Left, true) => transpose_rows(lines, first, steps, to),
                    (Side::Right, false) => transpose_pairs(s, lines, first, steps, to),
                    (Side::Right, true) => pair_up(lines, first, steps, to),
                }
            }
        }
    }

    fn begin(self) -> Ready {
        self.0.begin()
    }

    #[inline(always)]
    fn tile<S: Simd, const NV: usize>(ready: &Ready, _: S, left: &[bf16], right: [&[bf16]; 2], out: &mut [Lanes<f32>]) {
        ready.tile(left, right, out);
    }
}

/// `to[i][p] = lines[first + i][steps.start + p]`, lines contiguous along the depth
#[inline(always)]
fn copy_rows(lines: Matrix<'_, bf16>, first: usize, steps: Range<usize>, to: &mut [bf16]) {
    for (i, to) in to.as_chunks_mut::<STEP>().0.iter_mut().enumerate() {
        *to = if first + i < lines.rows { numbers(lines.run(first + i), &steps) } else { [bf16::ZERO; STEP] };
    }
}

/// 32 numbers of a line, filled up with zeros.
#[inline(always)]
fn numbers(line: &[bf16], steps: &Range<usize>) -> [bf16; STEP] {
    if let Some(whole) = line[steps.start..].first_chunk() {
        return *whole;
    }
    let mut numbers = [bf16::ZERO; STEP];
    numbers[..steps.len()].copy_from_slice(&line[steps.clone()]);
    numbers
}

/// `to[i][p] = lines[first + i][steps.start + p]`, lines not contiguous along the depth
#[inline(always)]
fn transpose_rows(lines: Matrix<'_, bf16>, first: usize, steps: Range<usize>, to: &mut [bf16]) {
    let rows = to.as_chunks_mut::<STEP>().0;
    rows.fill([bf16::ZERO; STEP]);
    let last = lines.rows.min(first + rows.len());
    for (p, step) in steps.enumerate() {
        for (to, &number) in rows.iter_mut().zip(lines.run(step).get(first..last).unwrap_or_default()) {
            to[p] = number;
        }
    }
}

/// `to[j / 16][p][j % 16] = (lines[first + j][2p], lines[first + j][2p + 1])`, lines contiguous along the depth: blocks of
/// 16 lines × 16 pairs are transposed in registers, each pair as one lane of 32 bits.
#[inline(always)]
fn transpose_pairs<S: Simd>(s: S, lines: Matrix<'_, bf16>, first: usize, steps: Range<usize>, to: &mut [bf16]) {
    for (v, to) in to.as_chunks_mut::<{ LANES * STEP }>().0.iter_mut().enumerate() {
        let first = first + v * LANES;
        let mut cols = [s.splat(0.0); LANES];
        for j in 0..LANES.min(lines.rows.saturating_sub(first)) {
            cols[j] = s.load(&bytemuck::cast(numbers(lines.run(first + j), &steps)));
        }
        let transposed = s.transpose(cols);
        for (pairs, to) in transposed.into_iter().zip(to.as_chunks_mut::<STEP>().0) {
            let mut lanes = [0.0; LANES];
            s.store(pairs, &mut lanes);
            *to = bytemuck::cast(lanes);
        }
    }
}

/// `to[j / 16][p][j % 16] = (lines[first + j][2p], lines[first + j][2p + 1])`, lines not contiguous along the depth: two runs
/// of numbers are interleaved to one of pairs.
#[inline(always)]
fn pair_up(lines: Matrix<'_, bf16>, first: usize, steps: Range<usize>, to: &mut [bf16]) {
    let across = |step: usize, first: usize| {
        let run: &[bf16] = if steps.contains(&step) { lines.run(step).get(first..).unwrap_or_default() } else { &[] };
        let mut numbers = [bf16::ZERO; LANES];
        match run.first_chunk() {
            Some(whole) => numbers = *whole,
            None => numbers[..run.len()].copy_from_slice(run),
        }
        numbers
    };
    for (v, to) in to.as_chunks_mut::<{ LANES * STEP }>().0.iter_mut().enumerate() {
        for (pair, to) in to.as_chunks_mut::<2>().0.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
            let step = steps.start + 2 * pair;
            let (even, odd) = (across(step, first + v * LANES), across(step + 1, first + v * LANES));
            for j in 0..LANES {
                to[j] = [even[j], odd[j]];
            }
        }
    }
}

/// The number of `bf16` whose sum is an `f32`: 3·8 significant bits are 24.
const PIECES: usize = 3;

/// True if no element is infinite or NaN: only then may [`Split`] repeat the matrix. The later pieces of a number may be 0, and
/// `0·∞` would make NaN of an infinite product.
pub(super) fn all_finite(rhs: &Matrix<'_, bf16>) -> bool {
    rhs.runs().flatten().fold(true, |finite, number| finite & number.is_finite())
}

/// `scale·h·rhs = [h₀ h₁ h₂]·[rhs; rhs; rhs]`, a product of `bf16` of three times the depth: the number `scale·h` in `f32` is
/// the exact sum of three `bf16`. Products of two `bf16` are exact in `f32`, so the sum is as accurate as one of `f32`. An
/// infinite number of `h` is the first piece, and the others are 0; `rhs` must be [finite](all_finite). (`E` is always `bf16`;
/// the loop nest is generic.)
pub(super) struct Split<'e> {
    pieces: ScratchGuard<'e>,
    repeated: ScratchGuard<'e>,
    /// Rows and columns of `h`, columns of `rhs`.
    size: (usize, usize, usize),
    /// True if `rhs` is the transpose of a row-major matrix.
    transposed: bool,
}

impl<'e> Split<'e> {
    /// For an `h` of `m` rows.
    pub(super) fn new<E: Float>(engine: &'e Engine, m: usize, rhs: Matrix<'_, E>) -> Result<Self> {
        let (r, n) = (rhs.rows, rhs.cols);
        let pieces = engine.scratch.take_of::<bf16>(m * PIECES * r)?;
        let mut repeated = engine.scratch.take_of::<bf16>(PIECES * r * n)?;
        // A transposed matrix is stored by columns: each column is repeated. Otherwise the whole matrix is repeated.
        let mut to = repeated.as_mut::<E>().chunks_exact_mut(if rhs.transposed { r } else { n }.max(1));
        let mut append = |line: &[E]| to.next().into_iter().for_each(|to| to.copy_from_slice(line));
        match rhs.transposed {
            true => rhs.runs().flat_map(|line| [line; PIECES]).for_each(&mut append),
            false => (0..PIECES).flat_map(|_| rhs.runs()).for_each(&mut append),
        }
        Ok(Self { pieces, repeated, size: (m, r, n), transposed: rhs.transposed })
    }

    /// The depth of the product, `3r`.
    pub(super) fn depth(&self) -> usize {
        PIECES * self.size.1
    }

    /// The product, after splitting these rows of `h`.
    pub(super) fn update<E: Float>(&mut self, scale: f32, h: &[f32], rows: Range<usize>) -> Product<'_, E> {
        let (m, r, n) = self.size;
        let pieces = &mut self.pieces.as_mut::<bf16>()[PIECES * r * rows.start..PIECES * r * rows.end];
        for (pieces, h) in pieces.chunks_exact_mut((PIECES * r).max(1)).zip(h[r * rows.start..].chunks_exact(r.max(1))) {
            for (j, &h) in h.iter().enumerate() {
                let mut rest = scale * h;
                for piece in 0..PIECES {
                    let number = truncate(rest);
                    pieces[piece * r + j] = number;
                    rest = if number.is_finite() { rest - number.to_f32() } else { 0.0 };
                }
            }
        }
        let repeated = &self.repeated.as_ref::<E>()[..PIECES * r * n];
        let rhs = if self.transposed { Matrix::new(repeated, n, PIECES * r).t() } else { Matrix::new(repeated, PIECES * r, n) };
        let lhs = Factor::Elem(Matrix::new(&self.pieces.as_ref::<E>()[..PIECES * r * m], m, PIECES * r));
        Product { scale: 1.0, lhs, rhs: Factor::Elem(rhs) }
    }
}

/// The first 8 significant bits of a number; the rest has at most 16. NaN stays NaN.
fn truncate(value: f32) -> bf16 {
    if value.is_nan() { bf16::NAN } else { bf16::from_bits((value.to_bits() >> 16) as u16) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn three_pieces_add_up_to_the_number(value in proptest::num::f32::NORMAL) {
            let (mut rest, mut sum) = (value, 0.0f64);
            for _ in 0..PIECES {
                let piece = truncate(rest).to_f32();
                (rest, sum) = (rest - piece, sum + f64::from(piece));
            }
            prop_assert!(sum == f64::from(value) || value.abs() < 1e-30); // pieces may be too small for bf16 there
        }
    }
}
