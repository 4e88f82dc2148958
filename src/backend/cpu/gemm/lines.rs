//! Rows of weights, each times a number, added up: few lines on the left, with weights that are contiguous along the output.

use super::super::simd::{LANES, Simd};
use super::Matrix;
use super::skinny::Sums;
use crate::element::Float;

/// Rows of weights read side by side: as many streams as the hardware looks ahead in, and so many uses of each sum loaded.
const STREAMS: usize = 16;

impl Sums<'_> {
    /// `sums[i] += Σ_p left[p][i]·rhs[p]`
    #[inline(always)]
    pub(super) fn add_lines<S: Simd, R: Float>(&mut self, s: S, left: &[f32], rhs: Matrix<'_, R>) {
        let mut lines: [&[R]; STREAMS] = [&[]; STREAMS];
        for (block, left) in left.chunks(STREAMS * self.height).enumerate() {
            let depth = left.len() / self.height;
            for (p, line) in lines[..depth].iter_mut().enumerate() {
                *line = &rhs.run(block * STREAMS + p)[self.first..][..self.width];
            }
            match S::REGISTERS {
                32.. => self.add_block::<S, R, 5, 4>(s, left, &lines[..depth]),
                _ => self.add_block::<S, R, 2, 2>(s, left, &lines[..depth]),
            }
        }
    }

    /// In tiles of H rows by W vectors, whose sums stay in registers along the block.
    #[inline(always)]
    fn add_block<S: Simd, R: Float, const H: usize, const W: usize>(&mut self, s: S, left: &[f32], lines: &[&[R]]) {
        let wide = self.width / LANES / W * W;
        for v in (0..wide).step_by(W) {
            self.add_rows::<S, R, H, W>(s, left, lines, v);
        }
        for v in wide..self.vectors {
            self.add_rows::<S, R, H, 1>(s, left, lines, v);
        }
    }

    #[inline(always)]
    fn add_rows<S: Simd, R: Float, const H: usize, const W: usize>(&mut self, s: S, left: &[f32], lines: &[&[R]], v: usize) {
        let high = self.height / H * H;
        for i in (0..high).step_by(H) {
            self.add_tile::<S, R, H, W>(s, left, lines, (i, v));
        }
        let even = high + (self.height - high) / 2 * 2;
        for i in (high..even).step_by(2) {
            self.add_tile::<S, R, 2, W>(s, left, lines, (i, v));
        }
        if even < self.height {
            self.add_tile::<S, R, 1, W>(s, left, lines, (even, v));
        }
    }

    /// The tile whose first row is `i`, and whose first vector is `v`.
    #[inline(always)]
    fn add_tile<S: Simd, R: Float, const H: usize, const W: usize>(
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
                // Only a tile of one vector may reach beyond the edge.
                weights[w] = if W == 1 { s.widen_at(line, v) } else { s.widen(&line.as_chunks().0[v + w]) };
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
