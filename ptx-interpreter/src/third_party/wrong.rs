//! Misreadings of the PTX ISA, one at a time.

use crate::semantics::{Semantics, element, lhs, sum, swizzle};

const PTX: Semantics = Semantics::PTX;

/// Another swizzle for boxes and operands.
macro_rules! exchanged {
    ($f:expr) => {
        Semantics { box_byte: $f, operand_byte: |start, offset, line| $f(start + offset, line), ..PTX }
    };
}

/// The two columns of a pair are eight rows apart.
fn sum_with_pairs_below(lane: usize, register: usize) -> (usize, usize) {
    sum(lane, [0, 2, 1, 3][register % 4] + register / 4 * 4)
}

/// The second row of a lane is the next row.
fn sum_with_rows_next(lane: usize, register: usize) -> (usize, usize) {
    (lane / 4 * 2 + register / 2 % 2, sum(lane, register).1)
}

/// Misreadings: a name, a prefix of the names of kernels that must notice it, and the resulting semantics.
#[rustfmt::skip]
pub(super) static READINGS: [(&str, &str, Semantics); 29] = [
    ("no chunk is exchanged anywhere", "sm90_bf16", exchanged!(|at: u64, _line: u64| at)),
    ("no chunk of an operand is exchanged", "sm90_bf16", Semantics { operand_byte: |start, offset, _| start + offset, ..PTX }),
    ("no chunk of a box is exchanged", "copy90", Semantics { box_byte: |at, _| at, ..PTX }),
    ("chunks are exchanged by the bits of the address from 8 on", "sm90_bf16",
        exchanged!(|at: u64, line: u64| at ^ (at >> 8 & (line / 16 - 1)) << 4)),
    ("the bits that exchange chunks are reversed", "sm90_bf16",
        exchanged!(|at: u64, line: u64| {
            let bits = (line / 16).trailing_zeros();
            at ^ (at >> 7 & (line / 16 - 1)).reverse_bits() >> (64 - bits) << 4
        })),
    ("lines of 64 bytes are exchanged as those of 128", "sm90reg_tf32", exchanged!(|at: u64, _line: u64| swizzle(at, 128))),
    ("chunks of an operand are exchanged by the offset, not by the address", "sm90_bf16",
        Semantics { operand_byte: |start, offset, line| start + swizzle(offset, line), ..PTX }),
    ("K-major: the leap stands for the stride", "sm90_bf16",
        Semantics { row_chunk: |layout, row, chunk| row / 8 * layout.leap + row % 8 * layout.line + chunk * 16, ..PTX }),
    ("K-major: every line has 128 bytes", "sm90reg_tf32",
        Semantics { row_chunk: |layout, row, chunk| row / 8 * layout.stride + row % 8 * 128 + chunk * 16, ..PTX }),
    ("MN-major: leap and stride are exchanged", "sm90_bf16",
        Semantics { depth_chunk: |layout, chunk, depth| {
            let chunks = layout.line / 16;
            chunk / chunks * layout.stride + chunk % chunks * 16 + depth / 8 * layout.leap + depth % 8 * layout.line
        }, ..PTX }),
    ("the halves of the depth are exchanged in shared memory", "sm90reg_bf16",
        Semantics {
            row_chunk: |layout, row, chunk| (PTX.row_chunk)(layout, row, chunk ^ 1),
            depth_chunk: |layout, chunk, depth| (PTX.depth_chunk)(layout, chunk, depth ^ 8),
            ..PTX
        }),
    ("sums of wgmma: a pair of columns is a pair of rows", "sm90_bf16", Semantics { wgmma_sum: sum_with_pairs_below, ..PTX }),
    ("sums of wgmma: a lane's rows are neighbours", "sm90_bf16", Semantics { wgmma_sum: sum_with_rows_next, ..PTX }),
    ("sums of mma: a pair of columns is a pair of rows", "sm80", Semantics { mma_sum: sum_with_pairs_below, ..PTX }),
    ("sums of mma: a lane's rows are neighbours", "sm80", Semantics { mma_sum: sum_with_rows_next, ..PTX }),
    ("wgmma: the left side's registers 1 and 2 are exchanged", "sm90reg_bf16",
        Semantics { wgmma_lhs: |lane, register, part, parts| lhs(lane, [0, 2, 1, 3][register], part, parts), ..PTX }),
    ("wgmma in tf32: a lane's elements of the left side are neighbours", "sm90reg_tf32",
        Semantics { wgmma_lhs: |lane, register, part, parts| match parts {
            1 => (lane / 4 + register % 2 * 8, lane % 4 * 2 + register / 2),
            _ => lhs(lane, register, part, parts),
        }, ..PTX }),
    ("mma: the left side's registers 1 and 2 are exchanged", "sm80",
        Semantics { mma_lhs: |lane, register, part, parts| lhs(lane, [0, 2, 1, 3][register], part, parts), ..PTX }),
    ("mma: the halves of the right side are exchanged", "sm80",
        Semantics { mma_rhs: |lane, register, half| (PTX.mma_rhs)(lane, 1 - register, half), ..PTX }),
    ("ldmatrix transposes if it does not say so", "sm80",
        Semantics { loaded: |lane, half, transposed| element(lane, half, !transposed), ..PTX }),
    ("stmatrix transposes if it does not say so", "tma90",
        Semantics { stored: |lane, half, transposed| element(lane, half, !transposed), ..PTX }),
    ("the lanes of a row of a loaded matrix run backwards", "chain80",
        Semantics { loaded: |lane, half, transposed| element(lane ^ 3, half, transposed), ..PTX }),
    ("the lanes of a row of a stored matrix run backwards", "tma90",
        Semantics { stored: |lane, half, transposed| element(lane ^ 3, half, transposed), ..PTX }),
    ("the coordinates of a box begin with the outermost", "copy90", Semantics { coordinate: |axis, rank| rank - 1 - axis, ..PTX }),
    ("the parity of a phase that has ended is the other one", "copy90",
        Semantics { has_ended: |ended, parity| u64::from(ended & 1) == parity & 1, ..PTX }),
    ("a phase ends without its bytes", "copy90", Semantics { is_complete: |arrivals, _| arrivals == 0, ..PTX }),
    ("half of the bytes count", "copy90", Semantics { landed: |bytes| bytes as i64 / 2, ..PTX }),
    ("a box counts as one byte", "copy90", Semantics { landed: |_| 1, ..PTX }),
    ("to expect bytes is not to arrive", "copy90", Semantics { expecting: || 0, ..PTX }),
];

/// Not a misreading: mma takes the depth of both sides in reverse, which gives the same sum.
pub(super) static REVERSED: Semantics = Semantics {
    mma_lhs: |lane, register, part, parts| {
        let (row, depth) = lhs(lane, register, part, parts);
        (row, 15 - depth)
    },
    mma_rhs: |lane, register, half| {
        let (depth, col) = (PTX.mma_rhs)(lane, register, half);
        (15 - depth, col)
    },
    ..PTX
};
