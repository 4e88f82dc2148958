//! Packing: copies an operand into panels, in the order in which a micro-kernel reads it.
//!
//! A panel holds `width` *lines*, rows of the left side or columns of the right side, along the depth of all terms end to end.
//! Panels of `f32` are stored step by step: for each step of the depth, one number of each line. (The layout of other panels is
//! up to their [`Micro`]-kernel.) Panels at the edge are filled up with zeros, so the micro-kernel has no edge cases.

use std::ops::Range;

use super::super::simd::{Kernel, LANES, Lanes, Simd, Unit};
use super::micro::Micro;
use super::{Factor, Matrix, Product, quantised};
use crate::element::Float;

/// A side of the products.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// Panels of rows.
    Left,
    /// Panels of columns, multiplied by the scale of their term.
    Right,
}

/// Packs consecutive panels, starting with line `first`, for a range of the depth of all terms.
pub(super) struct Panels<'a, E, M: Micro> {
    pub(super) micro: M,
    pub(super) side: Side,
    pub(super) terms: &'a [Product<'a, E>],
    pub(super) depth: Range<usize>,
    pub(super) first: usize,
    pub(super) width: usize,
    /// Numbers from the start of a panel to that of the next, in `to`.
    pub(super) stride: usize,
    pub(super) to: &'a mut [M::Number],
}

impl<E: Float, M: Micro> Panels<'_, E, M> {
    /// Packs them. The part of each term is a kernel of its own, compiled for the element type of its matrix alone.
    pub(super) fn pack(self, unit: Unit) {
        let Self { micro, side, terms, depth, first, width, stride, to } = self;
        let (mut start, mut at) = (0, 0);
        for term in terms {
            let end = start + term.depth().next_multiple_of(M::STEP);
            let within = depth.start.clamp(start, end) - start..depth.end.clamp(start, end) - start;
            let len = width * within.len();
            let part = Part { depth: within, first, width, stride, to: to.get_mut(at..).unwrap_or_default() };
            // `lines × depth`, so the right side is transposed.
            let (lines, scale) = if side == Side::Left { (term.lhs, 1.0) } else { (term.rhs.t(), term.scale) };
            match lines {
                Factor::Elem(lines) => unit.run(PackPart { micro, side, part, lines, scale }),
                Factor::F32(lines) => unit.run(PackPart { micro, side, part, lines, scale }),
                Factor::Quantised(lines) => quantised::pack(unit, micro, side, part, lines, scale),
            }
            (start, at) = (end, at + len);
        }
    }
}

/// Packs the part of one term.
pub(super) struct PackPart<'a, T, M: Micro> {
    pub(super) micro: M,
    pub(super) side: Side,
    pub(super) part: Part<'a, M::Number>,
    pub(super) lines: Matrix<'a, T>,
    pub(super) scale: f32,
}

impl<T: Float, M: Micro> Kernel for PackPart<'_, T, M> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.micro.pack(s, self.side, self.part, self.lines, self.scale);
    }
}

/// Steps of the depth ahead that are prefetched, where each step is a contiguous run of its own.
const RUNS_AHEAD: usize = 8;

/// The part of consecutive panels that one term fills: `to[panel][p][i] = scale·lines[first + panel·width + i][p]`.
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
                    transpose_eights(s, lines, scale, depth.clone(), first, width, to);
                    continue;
                }
                for i in (0..width).step_by(LANES) {
                    transpose_sixteen(s, lines, scale, depth.clone(), first + i, (i, width), to);
                }
            }
            return;
        }
        // Lines are columns in memory: each step of the depth is a contiguous run, which is cut into pieces for the panels.
        let last = lines.rows.min(first + to.len().div_ceil(stride) * width);
        let end = width * depth.len();
        for (step, p) in depth.enumerate() {
            let run = &lines.run(p)[first..last];
            // The next runs may lie in other pages, which hardware does not prefetch.
            for at in (0..run.len()).step_by(64 / size_of::<T>()) {
                s.prefetch(run, RUNS_AHEAD * lines.stride + at);
            }
            for (panel, to) in to.chunks_mut(stride).enumerate() {
                copy_scaled(s, &run[panel * width..], scale, width, &mut to[step * width..end]);
            }
        }
    }
}

/// `to[..width] = scale·from`, filled up with zeros. The last vector may also write into the steps behind this one, which are
/// packed later and overwrite that.
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

/// `to[p][i] = scale·lines[first + i][p]` for the `width` lines of a panel, which are contiguous along the depth; missing lines
/// are zeros.
///
/// Eight lines at a time, from the last lines to the first. The vectors of a group with fewer than eight lines reach into the
/// first lines of the next step; the groups that follow overwrite those.
#[inline(always)]
fn transpose_eights<S: Simd, T: Float>(
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
        let present = lines.rows.saturating_sub(first + at).min(8).min(width - at);
        if present > 0 {
            let mut eight = [&lines.run(first + at)[depth.clone()]; 8];
            for i in 1..present {
                eight[i] = &lines.run(first + at + i)[depth.clone()];
            }
            s.transpose_lines(eight, scale, to, width);
        }
        for i in present..8.min(width - at) {
            to[i..].iter_mut().step_by(width).for_each(|number| *number = 0.0);
        }
    }
}

/// `to[p][at + i] = scale·lines[first + i][p]` for up to sixteen lines that are contiguous along the depth: blocks of 16×16 are
/// transposed in registers. Missing lines are zeros.
///
/// A panel narrower than sixteen is written with overlapping stores: each overwrites what the one before it wrote beyond its
/// step.
#[inline(always)]
fn transpose_sixteen<S: Simd, T: Float>(
    s: S,
    lines: Matrix<'_, T>,
    scale: f32,
    depth: Range<usize>,
    first: usize,
    (at, width): (usize, usize),
    to: &mut [f32],
) {
    let factor = s.splat(scale);
    let present = lines.rows.saturating_sub(first).min(width - at).min(LANES);
    for (to, p) in to.chunks_mut(width * LANES).zip(depth.clone().step_by(LANES)) {
        let mut numbers = [s.splat(0.0); LANES];
        if present == LANES && depth.end - p >= LANES {
            for i in 0..LANES {
                numbers[i] = s.mul(s.widen_at(&lines.run(first + i)[p..p + LANES], 0), factor);
            }
        } else {
            for i in 0..present {
                numbers[i] = s.mul(s.widen_at(&lines.run(first + i)[p..depth.end.min(p + LANES)], 0), factor);
            }
        }
        let transposed = s.transpose(numbers);
        for (p, numbers) in transposed.into_iter().enumerate().take(to.len() / width) {
            let to = &mut to[p * width + at..];
            let len = if at == 0 { to.len() } else { width - at };
            s.narrow_to(numbers, &mut to[..len.min(LANES)]);
        }
    }
}

/// Interleaves lines that are contiguous along the depth: `to[v·width + i]` is vector `v` of line `first + i`; missing lines
/// are zeros.
///
/// Without it, lines whose distance is a multiple of 4 KiB would compete for the same sets of L1 when they are read together.
pub(super) struct Interleave<'a, T> {
    pub(super) lines: Matrix<'a, T>,
    /// The first line.
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
