//! Products of a warp in fragments (mma), and the elements that fragments hold.

use crate::WARP;
use crate::float;
use crate::op::Half;
use crate::semantics::Semantics;
use crate::sums::MMA;

pub(crate) fn widen(half: Half, bits: u16) -> f32 {
    match half {
        Half::F16 => float::from_f16(bits),
        Half::BF16 => float::from_bf16(bits),
    }
}

/// Registers of a fragment, by lane.
pub(crate) type Fragment<const N: usize> = [[u32; WARP]; N];

/// Each half of each register, with its lane.
fn halves<const N: usize>(half: Half, fragment: &Fragment<N>) -> impl Iterator<Item = (usize, usize, usize, f32)> {
    let each = (0..N).flat_map(|i| (0..WARP).flat_map(move |lane| (0..2).map(move |part| (i, lane, part))));
    each.map(move |(i, lane, part)| (i, lane, part, widen(half, (fragment[i][lane] >> (16 * part)) as u16)))
}

/// `a·b + c` for `a` 16×16, `b` 16×8 and `c` 16×8.
pub(crate) fn multiply(semantics: &Semantics, half: Half, a: &Fragment<4>, b: &Fragment<2>, c: &Fragment<4>) -> Fragment<4> {
    let (mut lhs, mut rhs) = ([[0.0; 16]; 16], [[0.0; 8]; 16]);
    for (i, lane, part, value) in halves(half, a) {
        let (row, depth) = (semantics.mma_lhs)(lane, i, part, 2);
        lhs[row][depth] = value;
    }
    for (i, lane, part, value) in halves(half, b) {
        let (depth, col) = (semantics.mma_rhs)(lane, i, part);
        rhs[depth][col] = value;
    }
    let (place, mut sums) = (semantics.mma_sum, [[0.0; 8]; 16]);
    for (i, lane) in (0..4).flat_map(|i| (0..WARP).map(move |lane| (i, lane))) {
        let (row, col) = place(lane, i);
        sums[row][col] = f32::from_bits(c[i][lane]);
    }
    MMA.multiply(&lhs, &rhs, &mut sums);
    std::array::from_fn(|i| {
        std::array::from_fn(|lane| {
            let (row, col) = place(lane, i);
            sums[row][col].to_bits()
        })
    })
}
