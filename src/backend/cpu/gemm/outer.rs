//! `out = scale·lhsᵀ·rhs` with few columns, such as `dB = scale·dyᵀ·h`. It reads the left panels that another product, `dx = dy·W`, has
//! packed, so `lhs` is read from memory once for both.
//!
//! A panel holds `MR` rows of `lhs`. A step of the depth of the other product is a row of the output here:
//!
//! ```text
//! for each part of the output's rows                    (parallel)
//!   for each sixteen columns
//!     for each panel: the MR rows of rhs that belong to it stay in registers
//!       for each row p of the output: sums[p] += Σ_i panel[p][i]·rhs[i]
//! ```

use std::ops::Range;

use super::super::Engine;
use super::super::simd::{Kernel, LANES, Simd};
use super::depth::Depth;
use super::micro::Fma;
use super::packed_lhs::PackedLhs;
use super::{Block, Factor, Matrix, Output, Parts, Product};
use crate::element::Float;
use crate::error::Result;

/// Rows of the output in a task: 16 columns of their sums take 32 KiB.
const STEPS: usize = 512;

/// `out = scale·lhsᵀ·rhs`, `lhs m×n`, `rhs m×r`, `out n×r`; `lhs` is the left side of another product
pub(in super::super) struct Outer<'a> {
    pub(in super::super) scale: f32,
    pub(in super::super) rhs: Matrix<'a, f32>,
    pub(in super::super) out: Output<'a, f32>,
}

impl Outer<'_> {
    /// Memory for packed rows of `lhs`, for where the other product does not pack them as `f32`. Without rows, `out` is zero.
    pub(super) fn allocate_lhs<'e, E: Float>(&mut self, engine: &'e Engine, lhs: Factor<'_, E>) -> Result<PackedLhs<'e, Fma>> {
        if lhs.rows() == 0 {
            self.out.data().fill(0.0);
        }
        PackedLhs::new(engine, Fma, lhs.rows(), Depth::new::<Fma>(lhs.cols(), 0))
    }

    /// Packs a chunk of rows of `lhs` and [adds](Self::add) it.
    pub(super) fn pack_and_add<E: Float>(
        &mut self,
        engine: &Engine,
        lhs: Factor<'_, E>,
        left: &mut PackedLhs<'_, Fma>,
        rows: Range<usize>,
    ) -> Result<()> {
        let term = Product { scale: 1.0, lhs, rhs: lhs }; // only its left side is read
        left.pack(engine, &[term], rows.start, 0..lhs.cols());
        self.add(engine, left, rows)
    }

    /// `out += scale·lhsᵀ·rhs` over the given rows of `lhs`, which are packed in `left`. The chunk from row 0 overwrites `out`.
    pub(super) fn add(&mut self, engine: &Engine, left: &PackedLhs<'_, Fma>, rows: Range<usize>) -> Result<()> {
        let (out, rhs, scale) = (self.out.reborrow(), self.rhs, self.scale);
        let down = Parts::new(out.rows(), 1, STEPS, engine.threads());
        let across = Parts::new(out.cols(), out.cols().max(1), out.cols(), 1);
        out.for_each_block(engine, down, across, rows.len(), |block| {
            engine.unit.run(Task { block, left, rows: rows.clone(), rhs, scale });
            Ok(())
        })
    }
}

struct Task<'a, 'o> {
    block: Block<'o, f32>,
    left: &'a PackedLhs<'a, Fma>,
    rows: Range<usize>,
    rhs: Matrix<'a, f32>,
    scale: f32,
}

impl Kernel for Task<'_, '_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match S::MR {
            14 => self.sum::<S, 14>(s),
            _ => self.sum::<S, 6>(s),
        }
    }
}

impl Task<'_, '_> {
    #[inline(always)]
    fn sum<S: Simd, const MR: usize>(mut self, s: S) {
        let (height, width) = (self.block.rows().len(), self.block.cols().len());
        let scale = s.splat(self.scale);
        for v in 0..width.div_ceil(LANES) {
            let mut sums = [[0.0; LANES]; STEPS];
            for (panel, row) in self.rows.clone().step_by(MR).enumerate() {
                let mut factors = [s.splat(0.0); MR];
                for i in 0..MR.min(self.rows.end - row) {
                    factors[i] = s.widen_at(self.rhs.run(row + i), v);
                }
                for within in self.left.blocks_within(self.block.rows()) {
                    let numbers = self.left.panel_part(panel, &within).as_chunks::<MR>().0;
                    let sums = &mut sums[within.start - self.block.rows().start..];
                    for (numbers, sum) in numbers.iter().zip(sums) {
                        let mut total = s.load(sum);
                        for i in 0..MR {
                            total = s.mul_add(s.splat(numbers[i]), factors[i], total);
                        }
                        s.store(total, sum);
                    }
                }
            }
            for p in 0..height {
                let to = &mut self.block.line(p)[v * LANES..];
                let len = to.len().min(LANES);
                let before = if self.rows.start == 0 { s.splat(0.0) } else { s.widen_at(to, 0) };
                s.narrow_to(s.mul_add(scale, s.load(&sums[p]), before), &mut to[..len]);
            }
        }
    }
}
