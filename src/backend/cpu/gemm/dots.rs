//! Dot products: few lines on the left, interleaved in groups that stay in L1, with many lines of weights read once.

use super::super::simd::{LANES, Lanes, Simd};
use super::Matrix;
use super::plan::{ask_for_dots, together};
use super::skinny::Sums;
use crate::element::Float;

/// Lines of weights read side by side, at most.
const ACROSS: usize = 4;
/// Numbers of the left side that stay in L1 (20 KiB) while dot products are made with them.
const STAYS: usize = 5 * 1024;

impl Sums<'_> {
    /// `sums += scale·left·rhs`, `rhs` contiguous along the depth
    #[inline(always)]
    pub(super) fn add_dots<S: Simd, R: Float>(&mut self, s: S, scale: f32, left: &[Lanes<f32>], rhs: Matrix<'_, R>) {
        match together(S::REGISTERS, self.height) {
            _ if rhs.rows == 0 => {}
            _ if rhs.rows < LANES => self.add_short_dots(s, scale, left, rhs),
            1 => self.add_long_dots::<S, R, 1, ACROSS>(s, scale, left, rhs),
            2 => self.add_long_dots::<S, R, 2, 3>(s, scale, left, rhs),
            _ => self.add_long_dots::<S, R, 5, ACROSS>(s, scale, left, rhs),
        }
    }

    /// Those of X lines with W at a time: X·W sums for X + W loads. A stretch of the left side stays in L1 while the right side goes
    /// by.
    #[inline(always)]
    fn add_long_dots<S: Simd, R: Float, const X: usize, const W: usize>(
        &mut self,
        s: S,
        scale: f32,
        left: &[Lanes<f32>],
        rhs: Matrix<'_, R>,
    ) {
        let (vectors, groups, height) = (rhs.rows.div_ceil(LANES), self.height.div_ceil(X), self.height);
        let left: &[[Lanes<f32>; X]] = left.as_chunks().0;
        // By rows alone, not by X: every unit cuts the depth alike, and so sums in the same order.
        let rows = if X == 1 { 1 } else { self.height.next_multiple_of(5) };
        let stretch = (STAYS / rows).div_ceil(LANES);
        for start in (0..vectors).step_by(stretch) {
            let end = vectors.min(start + stretch);
            let depth = start * LANES..rhs.rows.min(end * LANES);
            for j in (0..self.width).step_by(W) {
                // At the edge the last line is taken again, and what it gives is dropped.
                let line = |w: usize| -> &[R] { &rhs.run(self.first + (j + w).min(self.width - 1))[depth.clone()] };
                let (right, next): ([&[R]; W], [&[R]; W]) = (std::array::from_fn(line), std::array::from_fn(|w| line(W + w)));
                self.add_dots_of_lines(s, scale, left, right, (depth.start, rhs.rows, j), |group| {
                    if ask_for_dots(S::REGISTERS, height) {
                        ask_for(s, next, group, groups);
                    }
                });
            }
        }
    }

    /// Those of W lines, which begin at a step of the depth and belong to the columns from `j` on; `before` is called for each group of
    /// rows.
    #[inline(always)]
    pub(super) fn add_dots_of_lines<S: Simd, R: Float, const X: usize, const W: usize>(
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
                let sums = &mut self.lanes.as_flattened_mut()[first..][..W.min(self.width - j)];
                for (sum, dot) in sums.iter_mut().zip(s.sums(four)) {
                    *sum += scale * dot;
                }
            }
        }
    }

    /// Those too short for vectors, as the ones over the rank of an adapter often are: sixteen lines of weights are turned
    /// instead.
    #[inline(always)]
    fn add_short_dots<S: Simd, R: Float>(&mut self, s: S, scale: f32, left: &[Lanes<f32>], rhs: Matrix<'_, R>) {
        let mut turned = [[0.0; LANES]; LANES];
        for v in 0..self.vectors {
            for j in 0..LANES.min(self.width - v * LANES) {
                for (turned, weight) in turned.iter_mut().zip(rhs.run(self.first + v * LANES + j)) {
                    turned[j] = weight.to_f32();
                }
            }
            for (i, left) in left[..self.height].iter().enumerate() {
                let to = &mut self.lanes[i * self.vectors + v];
                let mut sum = s.load(to);
                for (number, weights) in left.iter().zip(&turned[..rhs.rows]) {
                    sum = s.mul_add(s.splat(scale * number), s.load(weights), sum);
                }
                s.store(sum, to);
            }
        }
    }
}

/// Asks for one of equal parts of some lines.
#[inline(always)]
fn ask_for<S: Simd, R: Float, const W: usize>(s: S, lines: [&[R]; W], part: usize, parts: usize) {
    let len = lines[0].len();
    for line in lines {
        for at in (len * part / parts..len * (part + 1) / parts).step_by(64 / size_of::<R>()) {
            s.prefetch(line, at);
        }
    }
}

/// The products of X lines with W, of which only the lanes remain to be summed.
#[inline(always)]
fn dots<S: Simd, R: Float, const X: usize, const W: usize>(s: S, left: &[[Lanes<f32>; X]], right: [&[R]; W]) -> [[S::V; W]; X] {
    let mut sums = [[s.splat(0.0); W]; X];
    let mut weights = [s.splat(0.0); W];
    // Slices that are known to be as long: no index is looked at in the loop.
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
    for x in 0..X {
        let number = s.load(&left[x]);
        for w in 0..W {
            sums[x][w] = s.mul_add(number, weights[w], sums[x][w]);
        }
    }
}
