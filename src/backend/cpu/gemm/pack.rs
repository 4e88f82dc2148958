//! Packing: a depth block of all terms, side by side, as panels that the tile reads from front to back.
//!
//! A panel holds `width` numbers (rows of the left side, columns of the right) for each step of the depth. Edges are filled
//! with zeros up to a whole panel, so the tile has no edges.

use std::ops::Range;

use super::super::simd::{Kernel, LANES, Simd};
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

/// Turns lines that are contiguous along the depth, a vector's length at a time, so that the lines written stay in the cache.
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
    for (to, start) in to.chunks_mut(width * LANES).zip(depth.clone().step_by(LANES)) {
        let steps = LANES.min(depth.end - start);
        for i in 0..there {
            let from = &lines.run(first + i)[start..start + steps];
            let mut numbers = [0.0; LANES];
            s.store(s.mul(s.widen_at(from, 0), factor), &mut numbers);
            for p in 0..steps {
                to[p * width + i] = numbers[p];
            }
        }
    }
}
