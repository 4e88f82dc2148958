//! The rank-k update: `out += scale·lhs·rhs` with little depth, which is merging. Most of the time goes into reading and
//! writing the output, once and in long runs; the packed right side stays in L2.
//!
//! ```text
//! pack the right side into panels of two vectors
//! for each block of rows and columns                       (parallel)
//!   for each R rows
//!     for each panel: sums = 0;  for p in depth: sums += left[p]·panel[p];  output += sums
//! ```
//!
//! `2·R` vectors of sums stay in registers (`R` on units with few registers). A panel is read from L2 once for R rows.

use super::super::Engine;
use super::super::caches::Caches;
use super::super::simd::{Kernel, LANES, Lanes, Simd};
use super::micro::Fma;
use super::pack::{Panels, Side};
use super::plan::{RANK_K_AHEAD, RANK_K_DEPTH as DEPTH, RANK_K_RHS, RANK_K_ROWS, prefetch_in_rank_k};
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
        Panels { micro: Fma, side: Side::Right, terms, depth, first: 0, width: WIDTH, stride, to: &mut right }.pack(engine.unit);
    }
    let across = Parts::new(cols, WIDTH, RANK_K_RHS / depth.max(1), 1);
    let down = Parts::new(out.rows(), 8, RANK_K_ROWS, 1);
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
    /// Updates R rows of the block, from `row` on, W vectors at a time. The vectors of `GROUP` rows are all read before the
    /// first is written: if the distance of rows is a multiple of 4 KiB, a CPU that compares only the low bits of addresses
    /// would delay a load behind such a store.
    #[inline(always)]
    fn rows<S: Simd, const R: usize, const W: usize, const GROUP: usize>(&mut self, s: S, row: usize) {
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
        let prefetch = prefetch_in_rank_k(S::REGISTERS, self.bytes, self.caches);
        for v in 0..whole {
            for half in (0..2).step_by(W) {
                let mut sums = product::<S, R, W>(s, &panels[v * depth..][..depth], half, &factors);
                for first in (0..R).step_by(GROUP) {
                    for i in first..first + GROUP {
                        // Slices of constant length let the compiler unroll the loop and hold the sums in registers.
                        let line: &mut [[Lanes<O>; 2]] = lines[i].0.as_chunks_mut().0.as_chunks_mut().0;
                        for w in 0..W {
                            if prefetch {
                                s.prefetch(line.as_flattened(), 2 * v + half + w + RANK_K_AHEAD);
                            }
                            sums[i][w] = s.add(sums[i][w], s.widen(&line[v][half + w]));
                        }
                    }
                    for i in first..first + GROUP {
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

/// `factorsᵀ·panel`, for the vectors of the panel from `half` on. The sum starts at zero and not at the output, so that its
/// steps are rounded relative to the update and not to the larger output.
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
