//! Packing: copies in the order in which a kernel reads them.
//!
//! A panel runs along the depth of all terms, laid end to end. It holds `width` numbers (rows of the left side, columns of the
//! right) for each step of the depth. Edges are filled with zeros up to a whole panel, so the tile has no edges. How the numbers
//! lie within a panel is for the [`Micro`] to say; here is how those of `f32` do, step by step.

use std::ops::Range;

use super::super::simd::{Kernel, LANES, Lanes, Simd};
use super::micro::Micro;
use super::{Factor, Matrix, Product, quantised};
use crate::element::Float;

/// Which side of the products.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// Panels of rows.
    Left,
    /// Panels of columns, multiplied with the scale of their term.
    Right,
}

/// Packs neighbouring panels, the first of which begins at line `first`, for a range of the depth that runs through all terms.
pub(super) struct Panels<'a, E, M: Micro> {
    pub(super) micro: M,
    pub(super) side: Side,
    pub(super) terms: &'a [Product<'a, E>],
    pub(super) depth: Range<usize>,
    pub(super) first: usize,
    pub(super) width: usize,
    /// From where a panel is written to where the next one is.
    pub(super) stride: usize,
    pub(super) to: &'a mut [M::Number],
}

impl<E: Float, M: Micro> Kernel for Panels<'_, E, M> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { micro, side, terms, depth, first, width, stride, to } = self;
        let (mut start, mut at) = (0, 0);
        for term in terms {
            let end = start + term.depth().next_multiple_of(M::STEP);
            let within = depth.start.clamp(start, end) - start..depth.end.clamp(start, end) - start;
            let len = width * within.len();
            let part = Part { depth: within, first, width, stride, to: to.get_mut(at..).unwrap_or_default() };
            // Both sides are seen as `panel line × depth`, so the right side is turned.
            match (side, term.lhs, term.rhs) {
                (Side::Left, Factor::Elem(m), _) => micro.pack(s, side, part, m, 1.0),
                (Side::Left, Factor::F32(m), _) => micro.pack(s, side, part, m, 1.0),
                (Side::Left, Factor::Quantised(m), _) => quantised::pack(s, micro, side, part, m, 1.0),
                (Side::Right, _, Factor::Quantised(m)) => quantised::pack(s, micro, side, part, m.t(), term.scale),
                (Side::Right, _, Factor::Elem(m)) => micro.pack(s, side, part, m.t(), term.scale),
                (Side::Right, _, Factor::F32(m)) => micro.pack(s, side, part, m.t(), term.scale),
            }
            (start, at) = (end, at + len);
        }
    }
}

/// Runs of a turned side that are asked for ahead: a few KiB.
const RUNS_AHEAD: usize = 8;

/// What one term gives to neighbouring panels: `to[panel][p][i] = scale·lines[first + panel·width + i][p]`.
pub(super) struct Part<'a, N> {
    pub(super) depth: Range<usize>,
    pub(super) first: usize,
    pub(super) width: usize,
    pub(super) stride: usize,
    pub(super) to: &'a mut [N],
}

impl Part<'_, f32> {
    #[inline(always)]
    pub(super) fn pack<S: Simd, T: Float>(self, s: S, lines: Matrix<'_, T>, scale: f32) {
        let Self { depth, first, width, stride, to } = self;
        if depth.is_empty() {
            return;
        }
        if !lines.transposed {
            for (panel, to) in to.chunks_mut(stride).enumerate() {
                let (first, to) = (first + panel * width, &mut to[..width * depth.len()]);
                if S::REGISTERS < 32 {
                    transpose(s, lines, scale, depth.clone(), first, width, to);
                    continue;
                }
                for i in (0..width).step_by(LANES) {
                    turn(s, lines, scale, depth.clone(), first + i, (i, width), to);
                }
            }
            return;
        }
        // Lines are columns in memory: a step of the depth is one run, cut into pieces for the panels.
        let last = lines.rows.min(first + to.len().div_ceil(stride) * width);
        let end = width * depth.len();
        for (step, p) in depth.enumerate() {
            let run = &lines.run(p)[first..last];
            // The next runs lie in other pages, where no hardware looks ahead.
            for at in (0..run.len()).step_by(64 / size_of::<T>()) {
                s.prefetch(run, RUNS_AHEAD * lines.stride + at);
            }
            for (panel, to) in to.chunks_mut(stride).enumerate() {
                copy_scaled(s, &run[panel * width..], scale, width, &mut to[step * width..end]);
            }
        }
    }
}

/// `to[..width] = scale·from`; what is missing is zeros. Whole vectors are written: what they write beyond the step belongs to
/// the steps that follow, which overwrite it.
#[inline(always)]
fn copy_scaled<S: Simd, T: Float>(s: S, from: &[T], scale: f32, width: usize, to: &mut [f32]) {
    let factor = s.splat(scale);
    for at in (0..width).step_by(LANES) {
        let numbers = if at < from.len() { s.widen_at(&from[at..], 0) } else { s.splat(0.0) };
        let to = &mut to[at..];
        let len = to.len().min(LANES);
        s.narrow_to(s.mul(numbers, factor), &mut to[..len]);
    }
}

/// `to[p][i] = scale·lines[first + i][p]` for the `width` lines of a panel, which are contiguous along the depth; what is missing is
/// zeros.
///
/// Eight lines at a time, the last ones first: where fewer than eight are left of the panel, the vectors that are written end in the
/// first lines of the next step, which are written after them.
#[inline(always)]
fn transpose<S: Simd, T: Float>(
    s: S,
    lines: Matrix<'_, T>,
    scale: f32,
    depth: Range<usize>,
    first: usize,
    width: usize,
    to: &mut [f32],
) {
    for at in (0..width).step_by(8).rev() {
        let to = &mut to[at..];
        let there = lines.rows.saturating_sub(first + at).min(8).min(width - at);
        if there > 0 {
            let mut eight = [&lines.run(first + at)[depth.clone()]; 8];
            for i in 1..there {
                eight[i] = &lines.run(first + at + i)[depth.clone()];
            }
            s.transpose_lines(eight, scale, to, width);
        }
        for i in there..8.min(width - at) {
            to[i..].iter_mut().step_by(width).for_each(|number| *number = 0.0);
        }
    }
}

/// Turns up to sixteen lines that are contiguous along the depth, from `first` on: sixteen steps of the depth at a time, in
/// registers. They become columns `at` and following of a panel `width` wide; what is missing is zeros.
///
/// A panel narrower than sixteen is written in overlapping vectors, each putting right what the one before it wrote too much.
#[inline(always)]
fn turn<S: Simd, T: Float>(
    s: S,
    lines: Matrix<'_, T>,
    scale: f32,
    depth: Range<usize>,
    first: usize,
    (at, width): (usize, usize),
    to: &mut [f32],
) {
    let factor = s.splat(scale);
    let there = lines.rows.saturating_sub(first).min(width - at).min(LANES);
    for (to, p) in to.chunks_mut(width * LANES).zip(depth.clone().step_by(LANES)) {
        let mut numbers = [s.splat(0.0); LANES];
        if there == LANES && depth.end - p >= LANES {
            for i in 0..LANES {
                numbers[i] = s.mul(s.widen_at(&lines.run(first + i)[p..p + LANES], 0), factor);
            }
        } else {
            for i in 0..there {
                numbers[i] = s.mul(s.widen_at(&lines.run(first + i)[p..depth.end.min(p + LANES)], 0), factor);
            }
        }
        let turned = s.transpose(numbers);
        for (p, numbers) in turned.into_iter().enumerate().take(to.len() / width) {
            let to = &mut to[p * width + at..];
            let len = if at == 0 { to.len() } else { width - at };
            s.narrow_to(numbers, &mut to[..len.min(LANES)]);
        }
    }
}

/// Interleaves lines that are contiguous along the depth: `to[v·width + i]` is vector `v` of line `first + i`; what is missing is
/// zeros.
///
/// Lines a few KiB long and read side by side would meet in the same few sets of the cache.
pub(super) struct Interleave<'a, T> {
    pub(super) lines: Matrix<'a, T>,
    /// Which line is the first.
    pub(super) first: usize,
    pub(super) width: usize,
    pub(super) to: &'a mut [Lanes<f32>],
}

impl<T: Float> Kernel for Interleave<'_, T> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (v, to) in self.to.chunks_exact_mut(self.width).enumerate() {
            for (i, to) in to.iter_mut().enumerate() {
                let line = self.first + i;
                let vector = if line < self.lines.rows { s.widen_at(self.lines.run(line), v) } else { s.splat(0.0) };
                s.store(vector, to);
            }
        }
    }
}
