//! Packing: copies in `f32`, in the order in which a kernel reads them.
//!
//! A panel is a depth block of all terms, side by side. It holds `width` numbers (rows of the left side, columns of the right) for each step of the depth. Edges are filled
//! with zeros up to a whole panel, so the tile has no edges.

use std::ops::Range;

use super::super::simd::{Kernel, LANES, Lanes, Simd};
use super::{Factor, Matrix, Product};
use crate::element::Float;

/// Which side of the products.
#[derive(Clone, Copy)]
pub(super) enum Side {
    /// Panels of rows, multiplied with the scale of their term.
    Left,
    /// Panels of columns.
    Right,
}

impl Side {
    /// How many lines of it there are to pack: rows of the output, or columns.
    pub(super) fn lines<E>(self, term: &Product<'_, E>) -> usize {
        match self {
            Side::Left => term.lhs.rows(),
            Side::Right => term.rhs.cols(),
        }
    }
}

/// Packs panel `panel` of one side, for a range of the depth that runs through all terms.
pub(super) struct Panel<'a, E> {
    pub(super) side: Side,
    pub(super) terms: &'a [Product<'a, E>],
    pub(super) depth: Range<usize>,
    pub(super) panel: usize,
    pub(super) width: usize,
    pub(super) to: &'a mut [f32],
}

impl<E: Float> Kernel for Panel<'_, E> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (mut start, mut to) = (0, self.to);
        for term in self.terms {
            let end = start + term.depth();
            let within = self.depth.start.clamp(start, end) - start..self.depth.end.clamp(start, end) - start;
            let (part, rest) = to.split_at_mut(within.len() * self.width);
            let first = self.panel * self.width;
            // Both sides are seen as `panel line × depth`, so the right side is turned.
            match (self.side, term.lhs, term.rhs) {
                (Side::Left, Factor::Stored(m), _) => pack(s, m, term.scale, within, first, self.width, part),
                (Side::Left, Factor::Wide(m), _) => pack(s, m, term.scale, within, first, self.width, part),
                (Side::Right, _, Factor::Stored(m)) => pack(s, m.t(), 1.0, within, first, self.width, part),
                (Side::Right, _, Factor::Wide(m)) => pack(s, m.t(), 1.0, within, first, self.width, part),
            }
            (start, to) = (end, rest);
        }
    }
}

/// `to[p][i] = scale·lines[first + i][p]`
#[inline(always)]
fn pack<S: Simd, T: Float>(
    s: S,
    lines: Matrix<'_, T>,
    scale: f32,
    depth: Range<usize>,
    first: usize,
    width: usize,
    to: &mut [f32],
) {
    let there = width.min(lines.rows - first);
    if there < width {
        to.fill(0.0);
    }
    if lines.transposed {
        // Lines are columns in memory: each step of the depth is one copy.
        for (line, p) in to.chunks_exact_mut(width).zip(depth) {
            copy_scaled(s, &lines.run(p)[first..first + there], scale, &mut line[..there]);
        }
    } else {
        turn(s, lines, scale, depth, first, there, width, to);
    }
}

/// `to = scale·from`
#[inline(always)]
fn copy_scaled<S: Simd, T: Float>(s: S, from: &[T], scale: f32, to: &mut [f32]) {
    let factor = s.splat(scale);
    for (v, to) in to.chunks_mut(LANES).enumerate() {
        s.narrow_to(s.mul(s.widen_at(from, v), factor), to);
    }
}

/// Interleaves lines that are contiguous along the depth: `to[v·width + i]` is vector `v` of line `i`, times `scale`; what is
/// missing is zeros.
///
/// Lines a few KiB long and read side by side would meet in the same few sets of the cache.
pub(super) struct Interleave<'a, T> {
    pub(super) lines: Matrix<'a, T>,
    pub(super) scale: f32,
    pub(super) width: usize,
    pub(super) to: &'a mut [Lanes<f32>],
}

impl<T: Float> Kernel for Interleave<'_, T> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let factor = s.splat(self.scale);
        for (v, to) in self.to.chunks_exact_mut(self.width).enumerate() {
            for (i, to) in to.iter_mut().enumerate() {
                let vector = if i < self.lines.rows { s.widen_at(self.lines.run(i), v) } else { s.splat(0.0) };
                s.store(s.mul(vector, factor), to);
            }
        }
    }
}

/// Steps of the depth that are turned at a time: a cache line or more of each line of the matrix is read in one go, and the
/// part of the panel written (64·32 floats, 8 KiB) stays in L1.
const TURNED: usize = 4 * LANES;

/// Turns lines that are contiguous along the depth.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "one loop nest, cut off from `pack` for its length only")]
fn turn<S: Simd, T: Float>(
    s: S,
    lines: Matrix<'_, T>,
    scale: f32,
    depth: Range<usize>,
    first: usize,
    there: usize,
    width: usize,
    to: &mut [f32],
) {
    let factor = s.splat(scale);
    for (to, start) in to.chunks_mut(width * TURNED).zip(depth.clone().step_by(TURNED)) {
        for i in 0..there {
            let from = &lines.run(first + i)[start..depth.end.min(start + TURNED)];
            for (v, to) in to.chunks_mut(width * LANES).enumerate() {
                let mut numbers = [0.0; LANES];
                s.store(s.mul(s.widen_at(from, v), factor), &mut numbers);
                for (to, number) in to.chunks_mut(width).zip(numbers) {
                    to[i] = number;
                }
            }
        }
    }
}
