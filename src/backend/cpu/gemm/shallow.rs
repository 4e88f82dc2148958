//! A product so shallow that the output is most of the work, added to what is there: merging. The output is read and written
//! once, in long runs; only the right side is kept near.
//!
//! ```text
//! pack the right side into panels of two vectors
//! for each band of rows × strip of columns                 (parallel)
//!   for each R rows
//!     for each panel: sums = 0;  for p in depth: sums += left[p]·panel[p];  output += sums
//! ```
//!
//! `2·R` sums stay in registers, and a panel, which comes from L2, is read once for R rows.

use super::super::Engine;
use super::super::simd::{Kernel, LANES, Lanes, Simd};
use super::micro::Fma;
use super::pack::{Panels, Side};
use super::plan::SHALLOW_DEPTH as DEPTH;
use super::{Block, Factor, Output, Parts, Product};
use crate::element::Float;
use crate::error::Result;

/// Columns of a panel.
const WIDTH: usize = 2 * LANES;
/// Rows a task takes, so that what it has of the right side is used often.
const BAND: usize = 64;
/// Numbers of the right side that stay in L2 (512 KiB).
const NEAR: usize = 128 * 1024;
/// Vectors ahead that the output is asked for.
const AHEAD: usize = 16;

/// `out += scale·lhs·rhs`
pub(super) fn run<E: Float, O: Float>(engine: &Engine, out: Output<'_, O>, term: &Product<'_, E>) -> Result<()> {
    let (depth, cols) = (term.depth(), out.cols());
    let stride = depth * WIDTH;
    let mut right = engine.scratch.take(cols.div_ceil(WIDTH) * stride)?;
    if !right.is_empty() {
        let (terms, depth) = (&[*term], 0..depth);
        engine.unit.run(Panels { micro: Fma, side: Side::Right, terms, depth, first: 0, width: WIDTH, stride, to: &mut right });
    }
    let across = Parts::new(cols, WIDTH, NEAR / depth.max(1), 1);
    let down = Parts::new(out.rows(), 8, BAND, 1);
    out.for_each_block(engine, down, across, depth, |block| {
        engine.unit.run(Task { block, lhs: term.lhs, depth, right: &right });
        Ok(())
    })
}

struct Task<'a, 'o, E, O> {
    block: Block<'o, O>,
    lhs: Factor<'a, E>,
    depth: usize,
    right: &'a [f32],
}

impl<E: Float, O: Float> Kernel for Task<'_, '_, E, O> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let height = self.block.rows().len();
        let mut row = 0;
        while S::REGISTERS >= 32 && row + 8 <= height {
            self.rows::<S, 8>(s, row);
            row += 8;
        }
        while row + 2 <= height {
            self.rows::<S, 2>(s, row);
            row += 2;
        }
        if row < height {
            self.rows::<S, 1>(s, row);
        }
    }
}

impl<E: Float, O: Float> Task<'_, '_, E, O> {
    /// R rows of the block, from `row` on.
    #[inline(always)]
    fn rows<S: Simd, const R: usize>(&mut self, s: S, row: usize) {
        let (depth, first) = (self.depth, self.block.cols().start / WIDTH);
        let mut factors = [[0.0; R]; DEPTH];
        for (p, factors) in factors[..depth].iter_mut().enumerate() {
            for i in 0..R {
                factors[i] = self.lhs.at(self.block.rows().start + row + i, p);
            }
        }
        let lines = self.block.lines::<R>(row);
        let whole = lines[0].len() / WIDTH;
        let mut lines = lines.map(|line| line.split_at_mut(whole * WIDTH));
        let panels = self.right[first * depth * WIDTH..].as_chunks().0.as_chunks().0;
        for v in 0..whole {
            let sums = product::<S, R>(s, &panels[v * depth..][..depth], &factors);
            for i in 0..R {
                // Without a slice that may be too short the loop is unrolled, and the sums stay in registers.
                let line: &mut [[Lanes<O>; 2]] = lines[i].0.as_chunks_mut().0.as_chunks_mut().0;
                s.prefetch(line.as_flattened(), 2 * v + AHEAD);
                s.prefetch(line.as_flattened(), 2 * v + AHEAD + 1);
                for (to, sum) in line[v].iter_mut().zip(sums[i]) {
                    s.narrow(s.add(sum, s.widen(to)), to);
                }
            }
        }
        if lines[0].1.is_empty() {
            return;
        }
        let sums = product::<S, R>(s, &panels[whole * depth..][..depth], &factors);
        for (line, sums) in lines.iter_mut().zip(sums) {
            for (to, sum) in line.1.chunks_mut(LANES).zip(sums) {
                s.narrow_to(s.add(sum, s.widen_at(to, 0)), to);
            }
        }
    }
}

/// `factorsᵀ·panel`. It is summed by itself: added to the output at once, each step would be rounded as the output is.
#[inline(always)]
fn product<S: Simd, const R: usize>(s: S, panel: &[[Lanes<f32>; 2]], factors: &[[f32; R]]) -> [[S::V; 2]; R] {
    let mut sums = [[s.splat(0.0); 2]; R];
    for (numbers, factors) in panel.iter().zip(factors) {
        let (left, right) = (s.load(&numbers[0]), s.load(&numbers[1]));
        for i in 0..R {
            let factor = s.splat(factors[i]);
            sums[i] = [s.mul_add(factor, left, sums[i][0]), s.mul_add(factor, right, sums[i][1])];
        }
    }
    sums
}
