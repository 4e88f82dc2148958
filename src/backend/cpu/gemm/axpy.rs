//! The skinny regime over an N-major right side: `sums[i] += Σ_p left[p][i]·rhs[p]`, whose rows `rhs[p]` are contiguous along
//! the output.
//!
//! ```text
//! for each block of the depth: up to 16 rows of rhs, a stream for the hardware prefetcher each
//!   for each W vectors of columns
//!     for each H rows of the output
//!       H·W sums in registers;  for p in block: sums[i] += left[p][i]·rhs[p];  stored to the sums in L1
//! ```

use super::super::simd::{LANES, Simd};
use super::Matrix;
use super::plan::{STREAMS, axpy_depth, prefetch_in_axpy};
use super::skinny::Sums;
use crate::element::Float;

impl Sums<'_> {
    /// `sums[i] += Σ_p left[p][i]·rhs[p]`
    #[inline(always)]
    pub(super) fn add_scaled_rows<S: Simd, R: Float>(&mut self, s: S, left: &[f32], rhs: Matrix<'_, R>) {
        let (mut rows, mut next): ([&[R]; STREAMS], [&[R]; STREAMS]) = ([&[]; STREAMS], [&[]; STREAMS]);
        let (first, width, streams) = (self.first, self.width, axpy_depth(S::REGISTERS, self.height));
        let row = |p: usize| -> &[R] { &rhs.run(p)[first..][..width] };
        for (block, left) in left.chunks(streams * self.height).enumerate() {
            let (start, depth) = (block * streams, left.len() / self.height);
            let coming = if prefetch_in_axpy(S::REGISTERS, self.height) { streams.min(rhs.rows - start - depth) } else { 0 };
            for p in 0..depth {
                rows[p] = row(start + p);
            }
            for p in 0..coming {
                next[p] = row(start + depth + p);
            }
            let (rows, next) = (&rows[..depth], &next[..coming]);
            match S::REGISTERS {
                32.. => self.add_block::<S, R, 5, 4>(s, left, rows, next),
                _ if self.height == 1 => self.add_block::<S, R, 1, 2>(s, left, rows, next),
                _ => self.add_block::<S, R, 5, 1>(s, left, rows, next),
            }
        }
    }

    /// Adds one block of the depth, in tiles of H rows by W vectors. Prefetches the next block, `next`.
    #[inline(always)]
    fn add_block<S: Simd, R: Float, const H: usize, const W: usize>(&mut self, s: S, left: &[f32], rows: &[&[R]], next: &[&[R]]) {
        let whole = self.width / LANES / W * W;
        for v in (0..whole).step_by(W) {
            for row in next {
                s.prefetch(row, v * LANES);
            }
            self.add_rows::<S, R, H, W, false>(s, left, rows, v);
        }
        for v in whole..self.vectors {
            self.add_rows::<S, R, H, 1, true>(s, left, rows, v);
        }
    }

    /// Adds W vectors of columns of all rows: tiles of H rows, then of 2, then of 1.
    #[inline(always)]
    fn add_rows<S: Simd, R: Float, const H: usize, const W: usize, const EDGE: bool>(
        &mut self,
        s: S,
        left: &[f32],
        rows: &[&[R]],
        v: usize,
    ) {
        let whole = self.height / H * H;
        for i in (0..whole).step_by(H) {
            self.add_tile::<S, R, H, W, EDGE>(s, left, rows, (i, v));
        }
        let even = whole + (self.height - whole) / 2 * 2;
        for i in (whole..even).step_by(2) {
            self.add_tile::<S, R, 2, W, EDGE>(s, left, rows, (i, v));
        }
        if even < self.height {
            self.add_tile::<S, R, 1, W, EDGE>(s, left, rows, (even, v));
        }
    }

    /// Adds to the tile of H rows from `i` on and W vectors from `v` on. With `EDGE`, the last vector may reach beyond the last
    /// column.
    #[inline(always)]
    fn add_tile<S: Simd, R: Float, const H: usize, const W: usize, const EDGE: bool>(
        &mut self,
        s: S,
        left: &[f32],
        rows: &[&[R]],
        (i, v): (usize, usize),
    ) {
        let (mut sums, mut weights) = ([[s.splat(0.0); W]; H], [s.splat(0.0); W]);
        for x in 0..H {
            for w in 0..W {
                sums[x][w] = s.load(&self.lanes[(i + x) * self.vectors + v + w]);
            }
        }
        for (row, left) in rows.iter().zip(left.chunks_exact(self.height)) {
            for w in 0..W {
                weights[w] = if EDGE { s.widen_at(row, v) } else { s.widen(&row.as_chunks().0[v + w]) };
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
