//! Units that multiply `bf16` by pairs and add up in `f32`: what a 16-bit product needs, where a CPU has one.
//!
//! Both read the same panels. A panel holds 32 steps of the depth at a time, and of these
//!
//! - on the left, 32 numbers of each row, row after row: `left[step / 32][i][step % 32]`;
//! - on the right, for each sixteen columns, sixteen pairs of steps: `right[step / 32][j / 16][step % 32 / 2][j % 16][step % 2]`.
//!
//! Sixteen rows of the one and sixteen columns of the other are each a tile of AMX, and lie in 1 KiB.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use super::amx::{Amx, Tiles};
#[cfg(target_arch = "x86_64")]
use super::avx512_bf16::Avx512Bf16;
use super::{LANES, Lanes};
use crate::element::bf16;

/// Steps of the depth that lie together in a panel.
pub(crate) const STEP: usize = 32;
/// Columns of a panel, and vectors in a row of a tile.
pub(crate) const COLS: usize = NV * LANES;
pub(crate) const NV: usize = 2;

/// The sixteen pairs that sixteen columns have for two steps, or sixteen pairs of steps that a row has: a row of an AMX tile.
pub(crate) type TileRow = [[bf16; 2]; 16];

/// The unit chosen at run time, with its proof.
#[derive(Clone, Copy)]
pub(crate) enum PairUnit {
    /// `tdpbf16ps`
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    Amx(Amx),
    /// `vdpbf16ps`
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16(Avx512Bf16),
    /// AMX, written out: for tests where there is none.
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

    /// Makes this thread ready for products.
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

/// A unit that this thread is ready to use.
pub(crate) enum Ready {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    Amx(Tiles),
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16(Avx512Bf16),
    Emulated,
}

impl Ready {
    /// `out[i][j] = Σ_p left[p][i]·right[p][j]`; the right panel comes in two pieces, one after the other.
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

/// What AMX makes of two panels, in its order: for each 32 steps, the products of even steps and of odd ones are summed apart,
/// then added, then added to the tile. (It also takes subnormal numbers for 0.)
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
