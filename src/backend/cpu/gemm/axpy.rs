//! Rows of weights, each times a number, added up: few lines on the left, with weights that are contiguous along the output.

use super::super::simd::{LANES, Simd};
use super::Matrix;
use super::plan::{STREAMS, ask_for_lines, streams};
use super::skinny::Sums;
use crate::element::Float;

impl Sums<'_> {
    /// `sums[i] += Σ_p left[p][i]·rhs[p]`
    #[inline(always)]
    pub(super) fn add_lines<S: Simd, R: Float>(&mut self, s: S, left: &[f32], rhs: Matrix<'_, R>) {
        let (mut lines, mut next): ([&[R]; STREAMS], [&[R]; STREAMS]) = ([&[]; STREAMS], [&[]; STREAMS]);
        let (first, width, streams) = (self.first, self.width, streams(S::REGISTERS, self.height));
        let line = |p: usize| -> &[R] { &rhs.run(p)[first..][..width] };
        for (block, left) in left.chunks(streams * self.height).enumerate() {
            let (start, depth) = (block * streams, left.len() / self.height);
            let coming = if ask_for_lines(S::REGISTERS, self.height) { streams.min(rhs.rows - start - depth) } else { 0 };
            for p in 0..depth {
                lines[p] = line(start + p);
            }
            for p in 0..coming {
                next[p] = line(start + depth + p);
            }
            let (lines, next) = (&lines[..depth], &next[..coming]);
            self.add_lines_of(s, left, lines, next);
        }
    }

    /// `sums[i] += Σ_p left[p][i]·lines[p]`; the next lines are asked for meanwhile.
    #[inline(always)]
    pub(super) fn add_lines_of<S: Simd, R: Float>(&mut self, s: S, left: &[f32], lines: &[&[R]], next: &[&[R]]) {
        match S::REGISTERS {
            32.. => self.add_block::<S, R, 5, 4>(s, left, lines, next),
            _ if self.height == 1 => self.add_block::<S, R, 1, 2>(s, left, lines, next),
            _ => self.add_block::<S, R, 5, 1>(s, left, lines, next),
        }
    }

    /// In tiles of H rows by W vectors, whose sums stay in registers along the block. The next block is asked for meanwhile.
    #[inline(always)]
    fn add_block<S: Simd, R: Float, const H: usize, const W: usize>(
        &mut self,
        s: S,
        left: &[f32],
        lines: &[&[R]],
        next: &[&[R]],
    ) {
        let wide = self.width / LANES / W * W;
        for v in (0..wide).step_by(W) {
            for line in next {
                s.prefetch(line, v * LANES);
            }
            self.add_rows::<S, R, H, W, false>(s, left, lines, v);
        }
        for v in wide..self.vectors {
            self.add_rows::<S, R, H, 1, true>(s, left, lines, v);
        }
    }

    #[inline(always)]
    fn add_rows<S: Simd, R: Float, const H: usize, const W: usize, const EDGE: bool>(
        &mut self,
        s: S,
        left: &[f32],
        lines: &[&[R]],
        v: usize,
    ) {
        let high = self.height / H * H;
        for i in (0..high).step_by(H) {
            self.add_tile::<S, R, H, W, EDGE>(s, left, lines, (i, v));
        }
        let even = high + (self.height - high) / 2 * 2;
        for i in (high..even).step_by(2) {
            self.add_tile::<S, R, 2, W, EDGE>(s, left, lines, (i, v));
        }
        if even < self.height {
            self.add_tile::<S, R, 1, W, EDGE>(s, left, lines, (even, v));
        }
    }

    /// The tile whose first row is `i`, and whose first vector is `v`; a tile at the edge may reach beyond it.
    #[inline(always)]
    fn add_tile<S: Simd, R: Float, const H: usize, const W: usize, const EDGE: bool>(
        &mut self,
        s: S,
        left: &[f32],
        lines: &[&[R]],
        (i, v): (usize, usize),
    ) {
        let (mut sums, mut weights) = ([[s.splat(0.0); W]; H], [s.splat(0.0); W]);
        for x in 0..H {
            for w in 0..W {
                sums[x][w] = s.load(&self.lanes[(i + x) * self.vectors + v + w]);
            }
        }
        for (line, left) in lines.iter().zip(left.chunks_exact(self.height)) {
            for w in 0..W {
                weights[w] = if EDGE { s.widen_at(line, v) } else { s.widen(&line.as_chunks().0[v + w]) };
            }
            for (number, sums) in left[i..i + H].iter().zip(&mut sums) {
                let number = s.splat(*number);
                for w in 0..W {
                    sums[w] = s.mul_add(number, weights[w], sums[w]);
                }
            }
        }
        for x in 0..H {
            for w in 0..W {
                s.store(sums[x][w], &mut self.lanes[(i + x) * self.vectors + v + w]);
            }
        }
    }
}
