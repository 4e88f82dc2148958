//! AVX-512: sixteen lanes in a register.
#![allow(unsafe_code, reason = "intrinsics: the token proves that the CPU has them; pointers come from references")]

use std::arch::x86_64::*;

use super::super::{CodeTable, Kernel, LANES, Lanes, Simd};
use super::avx2::add_halves;
use super::{Avx512, prefetch};

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn frame<K: Kernel>(s: Avx512, kernel: K) -> K::Out {
    kernel.run(s)
}

impl Simd for Avx512 {
    type V = __m512;
    const REGISTERS: usize = 32;

    #[inline]
    fn run<K: Kernel>(self, kernel: K) -> K::Out {
        intrinsics!(frame(self, kernel))
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::V {
        intrinsics!(_mm512_set1_ps(value))
    }
    #[inline(always)]
    fn load(self, from: &Lanes<f32>) -> Self::V {
        intrinsics!(_mm512_loadu_ps(from.as_ptr()))
    }
    #[inline(always)]
    fn store(self, value: Self::V, to: &mut Lanes<f32>) {
        intrinsics!(_mm512_storeu_ps(to.as_mut_ptr(), value))
    }
    #[inline(always)]
    fn load_f16(self, from: &Lanes<u16>) -> Self::V {
        intrinsics!(_mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().cast())))
    }
    #[inline(always)]
    fn store_f16(self, value: Self::V, to: &mut Lanes<u16>) {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        intrinsics!(_mm256_storeu_si256(to.as_mut_ptr().cast(), _mm512_cvtps_ph::<NEAREST>(value)))
    }
    #[inline(always)]
    fn load_bf16(self, from: &Lanes<u16>) -> Self::V {
        intrinsics!({
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
        })
    }
    /// Adds 0x7fff, just under half of the last place of the result, and the bit of that place, so that ties go to even. NaN
    /// becomes quiet.
    #[inline(always)]
    fn store_bf16(self, value: Self::V, to: &mut Lanes<u16>) {
        intrinsics!({
            let bits = _mm512_castps_si512(value);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
            let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(value, value);
            let upper = _mm512_srli_epi32::<16>(_mm512_mask_mov_epi32(rounded, nan, quiet));
            _mm256_storeu_si256(to.as_mut_ptr().cast(), _mm512_cvtepi32_epi16(upper))
        })
    }
    #[inline(always)]
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        intrinsics!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        intrinsics!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        intrinsics!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        intrinsics!(_mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn sqrt(self, a: Self::V) -> Self::V {
        intrinsics!(_mm512_sqrt_ps(a))
    }
    /// By comparison, since `max` would return -0 for -0.
    #[inline(always)]
    fn relu(self, a: Self::V) -> Self::V {
        intrinsics!(_mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NLE_UQ>(a, _mm512_setzero_ps()), a))
    }
    #[inline(always)]
    fn gate(self, gate: Self::V, a: Self::V) -> Self::V {
        intrinsics!(_mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(gate, _mm512_setzero_ps()), a))
    }
    #[inline(always)]
    fn if_equal(self, a: Self::V, b: Self::V, equal: Self::V, other: Self::V) -> Self::V {
        intrinsics!(_mm512_mask_mov_ps(other, _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(a, b), equal))
    }
    #[inline(always)]
    fn flush(self, a: Self::V) -> Self::V {
        const SUBNORMAL_OR_NEGATIVE_ZERO: i32 = 0x24;
        intrinsics!(_mm512_maskz_mov_ps(!_mm512_fpclass_ps_mask::<SUBNORMAL_OR_NEGATIVE_ZERO>(a), a))
    }
    #[inline(always)]
    fn sums(self, [a, b, c, d]: [Self::V; 4]) -> [f32; 4] {
        intrinsics!({
            let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
            let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
            let (even, odd) = unpack_pairs(ab, cd);
            let fours = _mm512_add_ps(even, odd);
            add_halves(_mm256_add_ps(_mm512_castps512_ps256(fours), _mm512_extractf32x8_ps::<1>(fours)))
        })
    }
    /// Shuffles pairs, then fours, then quarters: 64 shuffles for 256 numbers.
    #[inline(always)]
    fn transpose(self, rows: [Self::V; LANES]) -> [Self::V; LANES] {
        intrinsics!({
            let (mut fours, mut transposed) = (rows, rows);
            for g in (0..LANES).step_by(4) {
                let (low, high) = (_mm512_unpacklo_ps(rows[g], rows[g + 1]), _mm512_unpackhi_ps(rows[g], rows[g + 1]));
                let (low2, high2) = (_mm512_unpacklo_ps(rows[g + 2], rows[g + 3]), _mm512_unpackhi_ps(rows[g + 2], rows[g + 3]));
                (fours[g], fours[g + 1]) = unpack_pairs(low, low2);
                (fours[g + 2], fours[g + 3]) = unpack_pairs(high, high2);
            }
            // Quarter q of `fours[g + j]` is column 4q + j of rows g to g + 3.
            for j in 0..4 {
                let (even, odd) = quarters(fours[j], fours[4 + j]);
                let (even2, odd2) = quarters(fours[8 + j], fours[12 + j]);
                (transposed[j], transposed[8 + j]) = quarters(even, even2);
                (transposed[4 + j], transposed[12 + j]) = quarters(odd, odd2);
            }
            transposed
        })
    }
    #[inline(always)]
    fn look_up(self, codes: &[u8; 16], table: &CodeTable) -> [Self::V; 2] {
        intrinsics!({
            let values = _mm512_loadu_ps(table.values.as_ptr());
            let [even, odd] = look_up_bytes(_mm_loadu_si128(codes.as_ptr().cast()), values);
            let first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            let second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
            [_mm512_permutex2var_ps(even, first, odd), _mm512_permutex2var_ps(even, second, odd)]
        })
    }
    #[inline(always)]
    fn look_up_apart(self, codes: &[u8; 32], table: &CodeTable) -> [Self::V; 4] {
        intrinsics!({
            let values = _mm512_loadu_ps(table.values.as_ptr());
            let turns = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            let codes = _mm256_permutevar8x32_epi32(_mm256_loadu_si256(codes.as_ptr().cast()), turns);
            let [even, odd] = look_up_bytes(_mm256_castsi256_si128(codes), values);
            let [even2, odd2] = look_up_bytes(_mm256_extracti128_si256::<1>(codes), values);
            [even, even2, odd, odd2]
        })
    }
    #[inline(always)]
    fn load_i8(self, from: &Lanes<u8>) -> Self::V {
        intrinsics!(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.as_ptr().cast()))))
    }
    #[inline(always)]
    fn prefetch<T>(self, from: &[T], ahead: usize) {
        prefetch(from, ahead);
    }
}

/// Interleaves pairs of lanes of `a` and `b`: the lower pairs of each quarter, and the upper pairs.
#[inline]
#[target_feature(enable = "avx512f")]
fn unpack_pairs(a: __m512, b: __m512) -> (__m512, __m512) {
    let (a, b) = (_mm512_castps_pd(a), _mm512_castps_pd(b));
    (_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)))
}

/// Returns the even quarters of `a` and `b`, and the odd quarters.
#[inline]
#[target_feature(enable = "avx512f")]
fn quarters(a: __m512, b: __m512) -> (__m512, __m512) {
    (_mm512_shuffle_f32x4::<0b10_00_10_00>(a, b), _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b))
}

/// The values of two codes in each byte: those in upper halves, and those in lower ones.
#[inline]
#[target_feature(enable = "avx512f")]
fn look_up_bytes(codes: __m128i, values: __m512) -> [__m512; 2] {
    let two = _mm512_cvtepu8_epi32(codes);
    // Only the lowest four bits of an index count.
    [_mm512_permutexvar_ps(_mm512_srli_epi32::<4>(two), values), _mm512_permutexvar_ps(two, values)]
}
