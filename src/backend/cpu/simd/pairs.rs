//! Units that multiply pairs of `bf16` and add the products up in `f32`: AMX and AVX-512 BF16.
//!
//! Both read the same layout of panels. For every 32 steps of the depth, a panel holds
//!
//! - on the left, 32 numbers of each row, row by row: `left[step / 32][i][step % 32]`;
//! - on the right, sixteen pairs of steps for each sixteen columns: `right[step / 32][j / 16][step % 32 / 2][j % 16][step % 2]`.
//!
//! Sixteen rows on the left, and sixteen columns on the right, are 1 KiB of contiguous memory: one tile of AMX.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use super::amx::{Amx, Tiles};
#[cfg(target_arch = "x86_64")]
use super::avx512_bf16::Avx512Bf16;
use super::{LANES, Lanes};
use crate::element::bf16;

/// Steps of the depth that are stored together in a panel.
pub(crate) const STEP: usize = 32;
/// Columns of a panel.
pub(crate) const COLS: usize = NV * LANES;
/// Vectors in a row of a tile.
pub(crate) const NV: usize = 2;

/// A row of an AMX tile: sixteen pairs of steps of one row of the left side, or one pair of steps of sixteen columns of the
/// right side.
pub(crate) type TileRow = [[bf16; 2]; 16];

/// A unit for pairs, chosen at run time.
#[derive(Clone, Copy)]
pub(crate) enum PairUnit {
    /// `tdpbf16ps`
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    Amx(Amx),
    /// `vdpbf16ps`
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16(Avx512Bf16),
    /// An emulation of AMX in Rust, for tests on other CPUs.
    Emulated,
}

impl PairUnit {
    /// Rows of the tile.
    pub(crate) fn rows(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16(_) => super::avx512_bf16::ROWS,
            _ => 32,
        }
    }

    /// Prepares the calling thread for [`Ready::tile`].
    pub(crate) fn begin(self) -> Ready {
        match self {
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Amx(amx) => Ready::Amx(amx.begin()),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16(unit) => Ready::Avx512Bf16(unit),
            Self::Emulated => Ready::Emulated,
        }
    }
}

/// A unit that is configured on this thread.
pub(crate) enum Ready {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    Amx(Tiles),
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16(Avx512Bf16),
    Emulated,
}

impl Ready {
    /// `out[i][j] = Σ_p left[p][i]·right[p][j]`; the right panel is given in two pieces along the depth.
    pub(crate) fn tile(&self, left: &[bf16], right: [&[bf16]; 2], out: &mut [Lanes<f32>]) {
        match self {
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Amx(tiles) => tiles.tile(left, right, out),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16(unit) => unit.tile(left, right, out),
            Self::Emulated => emulated(left, right, out),
        }
    }
}

/// Emulates AMX, in its order of summation: for each 32 steps, the products of even steps and of odd steps are summed
/// separately; the two sums are added, and the result is added to the tile. (AMX also treats subnormal numbers as 0, which is
/// not emulated.)
fn emulated(left: &[bf16], right: [&[bf16]; 2], out: &mut [Lanes<f32>]) {
    let (mut left, _) = left.as_chunks::<2>().0.as_chunks::<16>().0.as_chunks::<32>();
    let (out, _) = out.as_chunks_mut::<NV>();
    out[..32].fill([[0.0; LANES]; NV]);
    for right in right {
        let right: &[[[TileRow; 16]; NV]] = right.as_chunks::<2>().0.as_chunks().0.as_chunks().0.as_chunks().0;
        for (rows, cols) in left.iter().zip(right) {
            for (row, sums) in rows.iter().zip(&mut *out) {
                for (cols, sums) in cols.iter().zip(sums) {
                    add_pairs(row, cols, sums);
                }
            }
        }
        left = left.get(right.len()..).unwrap_or_default();
    }
}

/// `sums[j] += Σ_p row[p]·cols[p][j]`
fn add_pairs(row: &TileRow, cols: &[TileRow; 16], sums: &mut Lanes<f32>) {
    let (mut even, mut odd) = ([0.0f32; LANES], [0.0f32; LANES]);
    for (pair, cols) in row.iter().zip(cols) {
        let [a, b] = pair.map(bf16::to_f32);
        for j in 0..LANES {
            even[j] += a * cols[j][0].to_f32();
            odd[j] += b * cols[j][1].to_f32();
        }
    }
    for j in 0..LANES {
        sums[j] += even[j] + odd[j];
    }
}
