//! The micro-kernel of `f32`: a tile of the output stays in registers along the depth of a block.

use super::super::simd::{Kernel, LANES, Lanes, Simd};

/// Returns the rows of the unit's tile, and the vectors in each row.
pub(super) struct Shape;

impl Kernel for Shape {
    type Out = (usize, usize);
    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> (usize, usize) {
        (S::MR, S::NV)
    }
}

/// Steps of the depth ahead that panels are prefetched on AVX-512, where the right panel comes from L2 for each tile and
/// hardware prefetching is too late. The smaller tile of other units has one panel in L1 and reads few bytes of the other, so
/// prefetching only costs instructions: without it AVX2 is a fifth faster on a core with two threads.
const LHS_AHEAD: usize = 16;
const RHS_AHEAD: usize = 8;
/// Steps of the depth in an unrolled loop.
pub(super) const UNROLL: usize = 4;

/// `out[i][j] = Σ_p lhs[p][i]·rhs[p][j]`: `lhs` holds `MR` numbers for each p, `rhs` `NV` vectors, in two pieces along the
/// depth.
///
/// Per step of the depth: NV loads, MR broadcasts, MR·NV multiply-adds on as many independent sums. AVX-512 has 32
/// registers, 14·2 sums + 2 loads + 1 broadcast = 31; AVX2 has 16 of half the size, so 6·1 sums take 12 of them.
#[inline(always)]
pub(crate) fn microkernel<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    lhs: &[f32],
    rhs: [&[f32]; 2],
    out: &mut [Lanes<f32>],
) {
    let (mut lhs, _) = lhs.as_chunks::<MR>();
    let mut sums = [[s.splat(0.0); NV]; MR];
    for rhs in rhs {
        let rhs = rhs.as_chunks::<LANES>().0.as_chunks::<NV>().0;
        let (left, more) = lhs.split_at(rhs.len());
        if S::REGISTERS >= 32 {
            for (left, right) in left.iter().zip(rhs) {
                s.prefetch(left, LHS_AHEAD * MR);
                for vector in right {
                    s.prefetch(vector, RHS_AHEAD * NV * LANES);
                }
                step(s, left, right, &mut sums);
            }
        } else {
            let ((left, left_rest), (right, right_rest)) = (left.as_chunks::<UNROLL>(), rhs.as_chunks::<UNROLL>());
            for (left, right) in left.iter().zip(right) {
                for p in 0..UNROLL {
                    step(s, &left[p], &right[p], &mut sums);
                }
            }
            for (left, right) in left_rest.iter().zip(right_rest) {
                step(s, left, right, &mut sums);
            }
        }
        lhs = more;
    }
    let (out, _) = out.as_chunks_mut::<NV>();
    for (line, sum) in out.iter_mut().zip(sums) {
        for j in 0..NV {
            s.store(sum[j], &mut line[j]);
        }
    }
}

/// `sums[i][j] += left[i]·right[j]`
#[inline(always)]
pub(super) fn step<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    left: &[f32; MR],
    right: &[Lanes<f32>; NV],
    sums: &mut [[S::V; NV]; MR],
) {
    let mut vectors = [s.splat(0.0); NV];
    for j in 0..NV {
        vectors[j] = s.load(&right[j]);
    }
    for i in 0..MR {
        let number = s.splat(left[i]);
        for j in 0..NV {
            sums[i][j] = s.mul_add(number, vectors[j], sums[i][j]);
        }
    }
}
