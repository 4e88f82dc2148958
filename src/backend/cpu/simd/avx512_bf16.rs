//! AVX-512 BF16: `vdpbf16ps` multiplies sixteen pairs and adds both products to sixteen sums.
#![allow(unsafe_code, reason = "intrinsics: the token proves that the CPU has them")]

use std::arch::x86_64::*;

use super::pairs::{NV, TileRow};
use super::{LANES, Lanes};
use crate::element::bf16;

/// Proof that this CPU has AVX-512 F and BF16.
#[derive(Clone, Copy)]
pub(crate) struct Avx512Bf16(());

/// Rows of the tile: 14·2 sums and 2 vectors of the right side take 30 of the 32 registers.
pub(super) const ROWS: usize = 14;

impl Avx512Bf16 {
    pub(crate) fn new() -> Option<Self> {
        (is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16")).then_some(Self(()))
    }

    /// See [`Ready::tile`](super::pairs::Ready::tile).
    pub(super) fn tile(self, left: &[bf16], right: [&[bf16]; 2], out: &mut [Lanes<f32>]) {
        // SAFETY: `self` proves that the CPU has the features.
        unsafe { tile(left, right, out) }
    }
}

/// `out[i][j] = Σ_p left[p][i]·right[p][j]`. For each pair of steps: 2 loads, 14 broadcasts from memory, 28 products.
#[target_feature(enable = "avx512f,avx512bf16")]
fn tile(left: &[bf16], right: [&[bf16]; 2], out: &mut [Lanes<f32>]) {
    let (mut left, _) = left.as_chunks::<2>().0.as_chunks::<16>().0.as_chunks::<ROWS>();
    let mut sums = [[_mm512_setzero_ps(); NV]; ROWS];
    for right in right {
        let right: &[[[TileRow; 16]; NV]] = right.as_chunks::<2>().0.as_chunks().0.as_chunks().0.as_chunks().0;
        for (rows, cols) in left.iter().zip(right) {
            for p in 0..16 {
                let vectors = [pairs(&cols[0][p]), pairs(&cols[1][p])];
                for i in 0..ROWS {
                    let pair = broadcast(rows[i][p]);
                    for j in 0..NV {
                        sums[i][j] = _mm512_dpbf16_ps(sums[i][j], pair, vectors[j]);
                    }
                }
            }
        }
        left = left.get(right.len()..).unwrap_or_default();
    }
    for (to, sum) in out.as_chunks_mut::<NV>().0.iter_mut().zip(sums) {
        for j in 0..NV {
            let to: &mut Lanes<f32> = &mut to[j];
            // SAFETY: the reference proves that sixteen numbers may be written.
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), sum[j]) };
        }
    }
}

/// Loads sixteen pairs.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn pairs(from: &TileRow) -> __m512bh {
    const { assert!(size_of::<TileRow>() == size_of::<Lanes<f32>>() && LANES == 16) };
    // SAFETY: the reference proves that 64 bytes may be read; any bits are sixteen pairs.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(from.as_ptr().cast())) }
}

/// Broadcasts one pair to every lane.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn broadcast(pair: [bf16; 2]) -> __m512bh {
    let bits = _mm512_set1_epi32(bytemuck::cast(pair));
    // SAFETY: any bits are sixteen pairs.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(bits) }
}
