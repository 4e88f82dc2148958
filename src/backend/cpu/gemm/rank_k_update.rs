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
//! `2·R` sums stay in registers, or `R` where there are few, and a panel, which comes from L2, is read once for R rows.

use super::super::Engine;
use super::super::caches::Caches;
use super::super::simd::{Kernel, LANES, Lanes, Simd};
use super::micro::Fma;
use super::pack::{Panels, Side};
use super::plan::{AHEAD, BAND, RANK_K_DEPTH as DEPTH, RANK_K_NEAR, ask_for_output};
use super::tile::{UNROLL, step};
use super::{Block, Factor, Output, Parts, Product};
use crate::element::Float;
use crate::error::Result;

/// Columns of a panel.
const WIDTH: usize = 2 * LANES;

/// `out += scale·lhs·rhs`
pub(super) fn run<E: Float, O: Float>(engine: &Engine, out: Output<'_, O>, term: &Product<'_, E>) -> Result<()> {
    let (depth, cols) = (term.depth(), out.cols());
    let stride = depth * WIDTH;
    let mut right = engine.scratch.take(cols.div_ceil(WIDTH) * stride)?;
    if !right.is_empty() {
        let (terms, depth) = (&[*term], 0..depth);
        engine.unit.run(Panels { micro: Fma, side: Side::Right, terms, depth, first: 0, width: WIDTH, stride, to: &mut right });
    }
    let across = Parts::new(cols, WIDTH, RANK_K_NEAR / depth.max(1), 1);
    let down = Parts::new(out.rows(), 8, BAND, 1);
    let bytes = out.rows() * cols * size_of::<O>();
    out.for_each_block(engine, down, across, depth, |block| {
        engine.unit.run(Task { block, lhs: term.lhs, depth, right: &right, bytes, caches: engine.caches });
        Ok(())
    })
}

struct Task<'a, 'o, E, O> {
    block: Block<'o, O>,
    lhs: Factor<'a, E>,
    depth: usize,
    right: &'a [f32],
    /// Bytes of the whole output.
    bytes: usize,
    caches: Caches,
}

impl<E: Float, O: Float> Kernel for Task<'_, '_, E, O> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let height = self.block.rows().len();
        let mut row = 0;
        if S::REGISTERS < 32 {
            while row + 4 <= height {
                self.rows::<S, 4, 1, 4>(s, row);
                row += 4;
            }
            for row in row..height {
                self.rows::<S, 1, 1, 1>(s, row);
            }
            return;
        }
        while row + 8 <= height {
            self.rows::<S, 8, 2, 1>(s, row);
            row += 8;
        }
        while row + 2 <= height {
            self.rows::<S, 2, 2, 1>(s, row);
            row += 2;
        }
        if row < height {
            self.rows::<S, 1, 2, 1>(s, row);
        }
    }
}

impl<E: Float, O: Float> Task<'_, '_, E, O> {
    /// R rows of the block, from `row` on, W vectors at a time. Of `TOGETHER` rows all numbers are read before one is written: rows
    /// 4 KiB apart look alike to a CPU that compares the lower bits of what it reads with what it is about to write.
    #[inline(always)]
    fn rows<S: Simd, const R: usize, const W: usize, const TOGETHER: usize>(&mut self, s: S, row: usize) {
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
        let ask = ask_for_output(S::REGISTERS, self.bytes, self.caches);
        for v in 0..whole {
            for half in (0..2).step_by(W) {
                let mut sums = product::<S, R, W>(s, &panels[v * depth..][..depth], half, &factors);
                for first in (0..R).step_by(TOGETHER) {
                    for i in first..first + TOGETHER {
                        // Without a slice that may be too short the loop is unrolled, and the sums stay in registers.
                        let line: &mut [[Lanes<O>; 2]] = lines[i].0.as_chunks_mut().0.as_chunks_mut().0;
                        for w in 0..W {
                            if ask {
                                s.prefetch(line.as_flattened(), 2 * v + half + w + AHEAD);
                            }
                            sums[i][w] = s.add(sums[i][w], s.widen(&line[v][half + w]));
                        }
                    }
                    for i in first..first + TOGETHER {
                        let line: &mut [[Lanes<O>; 2]] = lines[i].0.as_chunks_mut().0.as_chunks_mut().0;
                        for w in 0..W {
                            s.narrow(sums[i][w], &mut line[v][half + w]);
                        }
                    }
                }
            }
        }
        let rest = lines[0].1.len();
        for half in (0..2).step_by(W).filter(|half| half * LANES < rest) {
            let sums = product::<S, R, W>(s, &panels[whole * depth..][..depth], half, &factors);
            for (line, sums) in lines.iter_mut().zip(sums) {
                for (to, sum) in line.1[half * LANES..].chunks_mut(LANES).zip(sums) {
                    s.narrow_to(s.add(sum, s.widen_at(to, 0)), to);
                }
            }
        }
    }
}

/// `factorsᵀ·panel`, of the panel's vectors from `half` on. It is summed by itself: added to the output at once, each step would be rounded as the output is.
#[inline(always)]
fn product<S: Simd, const R: usize, const W: usize>(
    s: S,
    panel: &[[Lanes<f32>; 2]],
    half: usize,
    factors: &[[f32; R]],
) -> [[S::V; W]; R] {
    let mut sums = [[s.splat(0.0); W]; R];
    let (unrolled, rest) = if S::REGISTERS < 32 { panel.as_chunks::<UNROLL>() } else { (&[] as &[_], panel) };
    let (groups, factors) = factors.split_at(unrolled.len() * UNROLL);
    for (numbers, factors) in unrolled.iter().zip(groups.as_chunks::<UNROLL>().0) {
        for p in 0..UNROLL {
            step(s, &factors[p], &numbers[p].as_chunks().0[half / W], &mut sums);
        }
    }
    for (numbers, factors) in rest.iter().zip(factors) {
        step(s, factors, &numbers.as_chunks().0[half / W], &mut sums);
    }
    sums
}
