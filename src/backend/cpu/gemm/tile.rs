//! The micro-kernel: a tile of the output stays in registers along the depth of a block.

use super::super::simd::{Kernel, LANES, Lanes, Simd};

/// Rows of the unit's tile, and vectors in a row of it.
pub(super) struct Shape;

impl Kernel for Shape {
    type Out = (usize, usize);
    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> (usize, usize) {
        (S::MR, S::NV)
    }
}

/// How many steps of the depth ahead each panel is asked for. They come from L2, and the hardware alone fetches them late.
const LHS_AHEAD: usize = 16;
const RHS_AHEAD: usize = 8;

/// `out[i][j] = Σ_p lhs[p][i]·rhs[p][j]`: `lhs` holds `MR` numbers for each p, `rhs` `NV` vectors, in two pieces one after the
/// other.
///
/// Per step of the depth: NV loads, MR broadcasts, MR·NV multiply-adds on as many independent sums. AVX-512 has 32
/// registers, 14·2 sums + 2 loads + 1 broadcast = 31; AVX2 has 16 of half the size, so 6·1 sums take 12 of them.
#[inline(always)]
pub(crate) fn multiply<S: Simd, const MR: usize, const NV: usize>(s: S, lhs: &[f32], rhs: [&[f32]; 2], out: &mut [Lanes<f32>]) {
    let (mut lhs, _) = lhs.as_chunks::<MR>();
    let mut sums = [[s.splat(0.0); NV]; MR];
    for rhs in rhs {
        let rhs = rhs.as_chunks::<LANES>().0.as_chunks::<NV>().0;
        for (left, right) in lhs.iter().zip(rhs) {
            let mut vectors = [s.splat(0.0); NV];
            s.prefetch(left, LHS_AHEAD * MR);
            for j in 0..NV {
                s.prefetch(&right[j], RHS_AHEAD * NV * LANES);
                vectors[j] = s.load(&right[j]);
            }
            for i in 0..MR {
                let number = s.splat(left[i]);
                for j in 0..NV {
                    sums[i][j] = s.mul_add(number, vectors[j], sums[i][j]);
                }
            }
        }
        lhs = lhs.get(rhs.len()..).unwrap_or_default();
    }
    let (out, _) = out.as_chunks_mut::<NV>();
    for (line, sum) in out.iter_mut().zip(sums) {
        for j in 0..NV {
            s.store(sum[j], &mut line[j]);
        }
    }
}
