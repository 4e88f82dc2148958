//! The dot products of the skinny regime: `sums[i][j] += scale · Σ_p left[i][p]·rhs[p][j]`, with a K-major right side, whose
//! columns are rows of the weight.
//!
//! ```text
//! for each stretch of the depth: a piece of the left side that stays in L1
//!   for each W rows of the weight, which stream by once
//!     for each X rows of the left side
//!       X·W vectors of sums in registers, for X + W loads a step; then the lanes of each are summed
//! ```

use super::super::simd::{LANES, Lanes, Simd};
use super::Matrix;
use super::plan::{dot_rows, prefetch_in_dots, widen_before_dots};
use super::skinny::Sums;
use crate::element::Float;

/// The most rows of the weight that are read at the same time.
const ACROSS: usize = 4;
/// Numbers of the left side in a stretch of the depth (20 KiB): they stay in L1.
const LEFT_IN_L1: usize = 5 * 1024;
/// The most steps of the depth for which it pays to sum up the lanes of four vectors at a time, although one of eight vectors of sums
/// has no place in sixteen registers.
const SHORT_DEPTH: usize = 128;
/// The most steps of the depth in a stretch for several rows.
const STRETCH: usize = LEFT_IN_L1 / 5;

impl Sums<'_> {
    /// `sums += scale·left·rhs`, where `rhs` is contiguous along the depth
    #[inline(always)]
    pub(super) fn add_dots<S: Simd, R: Float>(&mut self, s: S, scale: f32, left: &[Lanes<f32>], rhs: Matrix<'_, R>) {
        match dot_rows(S::REGISTERS, self.height) {
            _ if rhs.rows == 0 => {}
            _ if rhs.rows < LANES => self.add_short_dots(s, scale, left, rhs),
            1 => self.add_long_dots::<S, R, 1, ACROSS, false>(s, scale, left, rhs),
            2 if rhs.rows <= SHORT_DEPTH => self.add_long_dots::<S, R, 2, ACROSS, false>(s, scale, left, rhs),
            2 if size_of::<R>() < size_of::<f32>() && widen_before_dots(S::REGISTERS, self.height) => {
                self.add_long_dots::<S, R, 2, 3, true>(s, scale, left, rhs);
            }
            2 => self.add_long_dots::<S, R, 2, 3, false>(s, scale, left, rhs),
            _ => self.add_long_dots::<S, R, 5, ACROSS, false>(s, scale, left, rhs),
        }
    }

    /// Dot products of X rows of the left side with W rows of the weight at a time. With `WIDEN`, these are widened once, to L1, instead of
    /// in the registers of each group of X rows.
    #[inline(always)]
    fn add_long_dots<S: Simd, R: Float, const X: usize, const W: usize, const WIDEN: bool>(
        &mut self,
        s: S,
        scale: f32,
        left: &[Lanes<f32>],
        rhs: Matrix<'_, R>,
    ) {
        let (vectors, groups) = (rhs.rows.div_ceil(LANES), self.height.div_ceil(X));
        let (first, width) = (self.first, self.width);
        let prefetches = prefetch_in_dots(S::REGISTERS, self.height) && rhs.rows > SHORT_DEPTH;
        let left: &[[Lanes<f32>; X]] = left.as_chunks().0;
        // A function of the rows, not of X, so that every vector unit cuts the depth in the same places and sums in the same
        // order.
        let rows = if X == 1 { 1 } else { self.height.next_multiple_of(5) };
        let stretch = (LEFT_IN_L1 / rows).div_ceil(LANES);
        let mut wide = [[0.0; STRETCH]; W];
        for start in (0..vectors).step_by(stretch) {
            let end = vectors.min(start + stretch);
            let depth = start * LANES..rhs.rows.min(end * LANES);
            for j in (0..width).step_by(W) {
                // At the edge the last row of the weight is repeated, and its results are dropped.
                let line = |w: usize| -> &[R] { &rhs.run(first + (j + w).min(width - 1))[depth.clone()] };
                let right: [&[R]; W] = each_line(line);
                let next: Option<[&[R]; W]> = prefetches.then(|| each_line(|w| line(W + w)));
                let (at, before) = ((depth.start, rhs.rows, j), |group| {
                    if let Some(next) = next {
                        prefetch_part(s, next, group, groups);
                    }
                });
                if WIDEN {
                    for (line, wide) in right.iter().zip(&mut wide) {
                        widen_line(s, line, &mut wide[..line.len()]);
                    }
                    let right: [&[f32]; W] = each_line(|w| &wide[w][..right[w].len()]);
                    self.add_dots_of_rows(s, scale, left, right, at, before);
                } else {
                    self.add_dots_of_rows(s, scale, left, right, at, before);
                }
            }
        }
    }

    /// `sums += scale·left·rightᵀ` for W rows of the weight, which begin at step `start` of a depth of `depth`, and belong to the columns
    /// from `j` on. Calls `before` for each group of rows on the left.
    #[inline(always)]
    pub(super) fn add_dots_of_rows<S: Simd, R: Float, const X: usize, const W: usize>(
        &mut self,
        s: S,
        scale: f32,
        left: &[[Lanes<f32>; X]],
        right: [&[R]; W],
        (start, depth, j): (usize, usize, usize),
        before: impl Fn(usize),
    ) {
        let (vectors, groups) = (depth.div_ceil(LANES), self.height.div_ceil(X));
        let stretch = start / LANES..start / LANES + right[0].len().div_ceil(LANES);
        for group in 0..groups {
            before(group);
            let dots = dots(s, &left[group * vectors..][stretch.clone()], right);
            for x in 0..X.min(self.height - group * X) {
                let mut four = [s.splat(0.0); ACROSS];
                four[..W].copy_from_slice(&dots[x]);
                let first = (group * X + x) * self.vectors * LANES + j;
                let (sums, dots) = (&mut self.lanes.as_flattened_mut()[first..], s.sums(four));
                match sums.first_chunk_mut::<W>() {
                    Some(sums) if j + W <= self.width => (0..W).for_each(|w| sums[w] += scale * dots[w]),
                    _ => sums[..self.width - j].iter_mut().zip(dots).for_each(|(sum, dot)| *sum += scale * dot),
                }
            }
        }
    }

    /// Dot products shorter than a vector, as over a small rank: blocks of 16 rows of the weight are transposed, so that a lane
    /// holds one column of the output. What a vector reads behind the end of a row is transposed too, and not used.
    #[inline(always)]
    fn add_short_dots<S: Simd, R: Float>(&mut self, s: S, scale: f32, left: &[Lanes<f32>], rhs: Matrix<'_, R>) {
        for v in 0..self.vectors {
            let mut lines = [s.splat(0.0); LANES];
            for (j, line) in lines.iter_mut().enumerate().take(self.width - v * LANES) {
                *line = s.widen_at(&rhs.data[(self.first + v * LANES + j) * rhs.stride..], 0);
            }
            let weights = s.transpose(lines);
            for (i, left) in left[..self.height].iter().enumerate() {
                let to = &mut self.lanes[i * self.vectors + v];
                let mut sum = s.load(to);
                for (number, weights) in left.iter().zip(&weights[..rhs.rows]) {
                    sum = s.mul_add(s.splat(scale * number), *weights, sum);
                }
                s.store(sum, to);
            }
        }
    }
}

/// `[line(0), …, line(W − 1)]`. In a call of two microseconds, [`std::array::from_fn`], which is not inlined, took a fifth of the time.
#[inline(always)]
pub(super) fn each_line<'r, R, const W: usize>(line: impl Fn(usize) -> &'r [R]) -> [&'r [R]; W] {
    let mut lines: [&[R]; W] = [&[]; W];
    for (w, to) in lines.iter_mut().enumerate() {
        *to = line(w);
    }
    lines
}

/// `to = line`, widened
#[inline(always)]
fn widen_line<S: Simd, R: Float>(s: S, line: &[R], to: &mut [f32]) {
    let (whole, last) = to.as_chunks_mut();
    for (from, to) in line.as_chunks().0.iter().zip(whole.iter_mut()) {
        s.store(s.widen(from), to);
    }
    if !last.is_empty() {
        s.narrow_to(s.widen_at(line, whole.len()), last);
    }
}

/// Prefetches part number `part` of `parts` of some rows of the weight.
#[inline(always)]
fn prefetch_part<S: Simd, R: Float, const W: usize>(s: S, lines: [&[R]; W], part: usize, parts: usize) {
    let len = lines[0].len();
    for line in lines {
        for at in (len * part / parts..len * (part + 1) / parts).step_by(64 / size_of::<R>()) {
            s.prefetch(line, at);
        }
    }
}

/// `sums[x][w]`, whose lanes add up to the dot product of row `x` of the left side and row `w` of the weight.
#[inline(always)]
pub(super) fn dots<S: Simd, R: Float, const X: usize, const W: usize>(
    s: S,
    left: &[[Lanes<f32>; X]],
    right: [&[R]; W],
) -> [[S::V; W]; X] {
    let mut sums = [[s.splat(0.0); W]; X];
    let mut weights = [s.splat(0.0); W];
    // With slices of equal length the compiler leaves the bounds checks out of the loop.
    let (left, rest) = left.split_at(right[0].len() / LANES);
    let lanes = right.map(|line| &line.as_chunks::<LANES>().0[..left.len()]);
    for (v, left) in left.iter().enumerate() {
        for w in 0..W {
            weights[w] = s.widen(&lanes[w][v]);
        }
        add(s, left, &weights, &mut sums);
    }
    if let [rest] = rest {
        for w in 0..W {
            weights[w] = s.widen_at(right[w], left.len());
        }
        add(s, rest, &weights, &mut sums);
    }
    sums
}

#[inline(always)]
fn add<S: Simd, const X: usize, const W: usize>(s: S, left: &[Lanes<f32>; X], weights: &[S::V; W], sums: &mut [[S::V; W]; X]) {
    for w in 0..W {
        for x in 0..X {
            sums[x][w] = s.mul_add(s.load(&left[x]), weights[w], sums[x][w]);
        }
    }
}
