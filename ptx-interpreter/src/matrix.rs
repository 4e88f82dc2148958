//! Matrix fragments: which element of a matrix which register of which lane holds.

use crate::WARP;
use crate::float;
use crate::op::Half;

/// Lane of an 8×8 matrix of 16-bit elements that holds (row, col), and which half of its register.
pub(crate) fn holder(row: usize, col: usize) -> (usize, usize) {
    (row * 4 + col / 2, col % 2)
}

pub(crate) fn widen(half: Half, bits: u16) -> f32 {
    match half {
        Half::F16 => float::from_f16(bits),
        Half::BF16 => float::from_bf16(bits),
    }
}

/// Registers of a fragment, lane by lane.
pub(crate) type Fragment<const N: usize> = [[u32; WARP]; N];

/// Element (row, col) of an 8×8 matrix in one register.
fn element(register: &[u32; WARP], row: usize, col: usize, half: Half) -> f32 {
    let (lane, part) = holder(row, col);
    widen(half, (register[lane] >> (16 * part)) as u16)
}

/// `a·b + c` for `a` 16×16, `b` 16×8 and `c` 16×8.
///
/// `a` is four 8×8 matrices: above and below, then the same to the right. `b` is two, one above the other, each transposed.
/// `c` is two, one above the other, of `f32`: two registers each.
pub(crate) fn multiply(half: Half, a: &Fragment<4>, b: &Fragment<2>, c: &Fragment<4>) -> Fragment<4> {
    let mut d = *c;
    for (row, col) in (0..16).flat_map(|row| (0..8).map(move |col| (row, col))) {
        let (lane, part) = holder(row % 8, col);
        let register = row / 8 * 2 + part;
        let mut sum = f32::from_bits(c[register][lane]);
        for k in 0..16 {
            let left = element(&a[row / 8 + k / 8 * 2], row % 8, k % 8, half);
            let right = element(&b[k / 8], col, k % 8, half);
            sum += left * right;
        }
        d[register][lane] = sum.to_bits();
    }
    d
}
