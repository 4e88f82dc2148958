//! AVX2 with FMA and F16C: sixteen lanes in two registers.
#![allow(unsafe_code, reason = "intrinsics: the token proves that the CPU has them; pointers come from references")]

use std::arch::x86_64::*;

use super::super::{CodeTable, Kernel, LANES, Lanes, Simd};
use super::{Avx2, prefetch};
use crate::element::{DType, Float};

#[target_feature(enable = "avx2,fma,f16c")]
fn frame<K: Kernel>(s: Avx2, kernel: K) -> K::Out {
    kernel.run(s)
}

/// The sums of lanes `i` and `i + 4`.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn add_halves(value: __m256) -> [f32; 4] {
    let sums = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps::<1>(value));
    let mut to = [0.0; 4];
    // SAFETY: the array has room for four numbers.
    unsafe { _mm_storeu_ps(to.as_mut_ptr(), sums) };
    to
}

/// Lane `i` of each half is the sum of the four lanes of that half of vector `i`.
#[inline]
#[target_feature(enable = "avx2")]
fn fours(a: __m256, b: __m256, c: __m256, d: __m256) -> __m256 {
    let ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    let cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    let even = _mm256_shuffle_ps::<0b01_00_01_00>(ab, cd);
    _mm256_add_ps(even, _mm256_shuffle_ps::<0b11_10_11_10>(ab, cd))
}

/// Applies an intrinsic to the lower and the upper eight lanes.
macro_rules! halves {
    ($op:expr, $($v:expr),+) => {
        intrinsics!([$op($($v[0]),+), $op($($v[1]),+)])
    };
}

/// Methods and not closures, since they must be inlined for their intrinsics to be compiled to instructions.
impl Avx2 {
    /// # Safety
    /// Eight numbers lie at `from`.
    #[inline(always)]
    unsafe fn widen8<T: Float>(self, from: *const T) -> __m256 {
        match T::DTYPE {
            DType::F32 => intrinsics!(_mm256_loadu_ps(from.cast())),
            DType::F16 => intrinsics!(_mm256_cvtph_ps(_mm_loadu_si128(from.cast()))),
            DType::BF16 => intrinsics!(self.widen_bf16(from.cast())),
        }
    }

    /// # Safety
    /// Eight `u16` lie at `from`.
    #[inline(always)]
    unsafe fn widen_bf16(self, from: *const __m128i) -> __m256 {
        intrinsics!(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(from)))))
    }

    /// Clears the lanes with an exponent of zero, which are subnormal or zero.
    #[inline(always)]
    fn flush8(self, a: __m256) -> __m256 {
        intrinsics!({
            let exponent = _mm256_and_si256(_mm256_castps_si256(a), _mm256_set1_epi32(0x7f80_0000));
            let subnormal = _mm256_cmpeq_epi32(exponent, _mm256_setzero_si256());
            _mm256_andnot_ps(_mm256_castsi256_ps(subnormal), a)
        })
    }

    /// The upper sixteen bits of each lane, rounded as in [`Simd::store_bf16`] of AVX-512.
    #[inline(always)]
    fn upper_bf16(self, value: __m256) -> __m256i {
        intrinsics!({
            let bits = _mm256_castps_si256(value);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
            let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(value, value));
            _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, nan))
        })
    }
}

impl Simd for Avx2 {
    type V = [__m256; 2];
    const REGISTERS: usize = 8;

    #[inline]
    fn run<K: Kernel>(self, kernel: K) -> K::Out {
        intrinsics!(frame(self, kernel))
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::V {
        intrinsics!([_mm256_set1_ps(value); 2])
    }
    #[inline(always)]
    fn load(self, from: &Lanes<f32>) -> Self::V {
        intrinsics!([_mm256_loadu_ps(from.as_ptr()), _mm256_loadu_ps(from[8..].as_ptr())])
    }
    #[inline(always)]
    fn store(self, value: Self::V, to: &mut Lanes<f32>) {
        intrinsics!({
            _mm256_storeu_ps(to.as_mut_ptr(), value[0]);
            _mm256_storeu_ps(to[8..].as_mut_ptr(), value[1]);
        })
    }
    #[inline(always)]
    fn load_f16(self, from: &Lanes<u16>) -> Self::V {
        intrinsics!([
            _mm256_cvtph_ps(_mm_loadu_si128(from.as_ptr().cast())),
            _mm256_cvtph_ps(_mm_loadu_si128(from[8..].as_ptr().cast())),
        ])
    }
    #[inline(always)]
    fn store_f16(self, value: Self::V, to: &mut Lanes<u16>) {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT;
        intrinsics!({
            _mm_storeu_si128(to.as_mut_ptr().cast(), _mm256_cvtps_ph::<NEAREST>(value[0]));
            _mm_storeu_si128(to[8..].as_mut_ptr().cast(), _mm256_cvtps_ph::<NEAREST>(value[1]));
        })
    }
    #[inline(always)]
    fn load_bf16(self, from: &Lanes<u16>) -> Self::V {
        intrinsics!([self.widen_bf16(from.as_ptr().cast()), self.widen_bf16(from[8..].as_ptr().cast())])
    }
    #[inline(always)]
    fn store_bf16(self, value: Self::V, to: &mut Lanes<u16>) {
        let (low, high) = (self.upper_bf16(value[0]), self.upper_bf16(value[1]));
        // `packus` packs within 128-bit halves; the permutation restores the order of the quarters.
        intrinsics!({
            let packed = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(low, high));
            _mm256_storeu_si256(to.as_mut_ptr().cast(), packed)
        })
    }
    #[inline(always)]
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        halves!(_mm256_fmadd_ps, a, b, c)
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        halves!(_mm256_add_ps, a, b)
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        halves!(_mm256_mul_ps, a, b)
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        halves!(_mm256_div_ps, a, b)
    }
    #[inline(always)]
    fn sqrt(self, a: Self::V) -> Self::V {
        halves!(_mm256_sqrt_ps, a)
    }
    /// By comparison, since `max` would return -0 for -0.
    #[inline(always)]
    fn relu(self, a: Self::V) -> Self::V {
        let open = halves!(_mm256_cmp_ps::<_CMP_NLE_UQ>, a, self.splat(0.0));
        halves!(_mm256_and_ps, open, a)
    }
    #[inline(always)]
    fn gate(self, gate: Self::V, a: Self::V) -> Self::V {
        let open = halves!(_mm256_cmp_ps::<_CMP_GT_OQ>, gate, self.splat(0.0));
        halves!(_mm256_and_ps, open, a)
    }
    #[inline(always)]
    fn if_equal(self, a: Self::V, b: Self::V, equal: Self::V, other: Self::V) -> Self::V {
        let mask = halves!(_mm256_cmp_ps::<_CMP_EQ_OQ>, a, b);
        halves!(_mm256_blendv_ps, other, equal, mask)
    }
    #[inline(always)]
    fn flush(self, a: Self::V) -> Self::V {
        [self.flush8(a[0]), self.flush8(a[1])]
    }
    #[inline(always)]
    fn sums(self, [a, b, c, d]: [Self::V; 4]) -> [f32; 4] {
        intrinsics!({
            let low = fours(a[0], b[0], c[0], d[0]);
            add_halves(_mm256_add_ps(low, fours(a[1], b[1], c[1], d[1])))
        })
    }
    /// In blocks of eight by eight.
    #[inline(always)]
    fn transpose_lines<T: Float>(self, lines: [&[T]; 8], scale: f32, to: &mut [f32], width: usize) {
        let steps = lines[0].len();
        assert!(lines.iter().all(|line| line.len() == steps));
        let (factor, mut p) = (intrinsics!(_mm256_set1_ps(scale)), 0);
        let mut block = [factor; 8];
        while p + 8 <= steps && (p + 7) * width + 8 <= to.len() {
            for i in 0..8 {
                // SAFETY: the line has at least `p + 8` numbers.
                block[i] = intrinsics!(_mm256_mul_ps(self.widen8(lines[i].as_ptr().add(p)), factor));
            }
            block = intrinsics!(transpose8(block));
            for i in 0..8 {
                intrinsics!(_mm256_storeu_ps(to.as_mut_ptr().add((p + i) * width), block[i]));
            }
            p += 8;
        }
        for (p, to) in to.chunks_mut(width).enumerate().skip(p) {
            for (to, line) in to.iter_mut().zip(lines) {
                *to = scale * line[p].to_f32();
            }
        }
    }
    /// In four blocks of eight by eight.
    #[inline(always)]
    fn transpose(self, rows: [Self::V; LANES]) -> [Self::V; LANES] {
        let mut transposed = rows;
        for half in 0..2 {
            for block in 0..2 {
                let mut square = [rows[0][0]; 8];
                for i in 0..8 {
                    square[i] = rows[8 * block + i][half];
                }
                let square = intrinsics!(transpose8(square));
                for j in 0..8 {
                    transposed[8 * half + j][block] = square[j];
                }
            }
        }
        transposed
    }
    #[inline(always)]
    fn look_up(self, codes: &[u8; 16], table: &CodeTable) -> [Self::V; 2] {
        intrinsics!({
            let (two, low) = (_mm_loadu_si128(codes.as_ptr().cast()), _mm_set1_epi8(15));
            let (even, odd) = (_mm_and_si128(_mm_srli_epi16::<4>(two), low), _mm_and_si128(two, low));
            let codes = _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
            let turns = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
            let [a, b, c, d] = look_up_bytes8(_mm256_permutevar8x32_epi32(codes, turns), table);
            [[a, b], [c, d]]
        })
    }
    #[inline(always)]
    fn look_up_apart(self, codes: &[u8; 32], table: &CodeTable) -> [Self::V; 4] {
        intrinsics!({
            let (two, low) = (_mm256_loadu_si256(codes.as_ptr().cast()), _mm256_set1_epi8(15));
            let [a, b, c, d] = look_up_bytes8(_mm256_and_si256(_mm256_srli_epi16::<4>(two), low), table);
            let [e, f, g, h] = look_up_bytes8(_mm256_and_si256(two, low), table);
            [[a, b], [c, d], [e, f], [g, h]]
        })
    }
    #[inline(always)]
    fn load_i8(self, from: &Lanes<u8>) -> Self::V {
        intrinsics!([
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.as_ptr().cast()))),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from[8..].as_ptr().cast()))),
        ])
    }
    #[inline(always)]
    fn prefetch<T>(self, from: &[T], ahead: usize) {
        prefetch(from, ahead);
    }
}

/// Transposes eight by eight: shuffles pairs, then fours, then halves.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose8(rows: [__m256; 8]) -> [__m256; 8] {
    let (mut fours, mut transposed) = (rows, rows);
    for g in [0, 4] {
        let (low, high) = (_mm256_unpacklo_ps(rows[g], rows[g + 1]), _mm256_unpackhi_ps(rows[g], rows[g + 1]));
        let (low2, high2) = (_mm256_unpacklo_ps(rows[g + 2], rows[g + 3]), _mm256_unpackhi_ps(rows[g + 2], rows[g + 3]));
        fours[g] = _mm256_shuffle_ps::<0b01_00_01_00>(low, low2);
        fours[g + 1] = _mm256_shuffle_ps::<0b11_10_11_10>(low, low2);
        fours[g + 2] = _mm256_shuffle_ps::<0b01_00_01_00>(high, high2);
        fours[g + 3] = _mm256_shuffle_ps::<0b11_10_11_10>(high, high2);
    }
    for j in 0..4 {
        transposed[j] = _mm256_permute2f128_ps::<0x20>(fours[j], fours[4 + j]);
        transposed[4 + j] = _mm256_permute2f128_ps::<0x31>(fours[j], fours[4 + j]);
    }
    transposed
}

/// The values of a code in each byte: their four bytes are looked up apart, and put together. The first vector has the first four codes
/// of each half, the second the next four.
#[inline]
#[target_feature(enable = "avx2")]
fn look_up_bytes8(codes: __m256i, table: &CodeTable) -> [__m256; 4] {
    // SAFETY: each plane has sixteen bytes.
    let plane = |i: usize| unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(table.planes[i].as_ptr().cast())) };
    let [a, b, c, d] = [
        _mm256_shuffle_epi8(plane(0), codes),
        _mm256_shuffle_epi8(plane(1), codes),
        _mm256_shuffle_epi8(plane(2), codes),
        _mm256_shuffle_epi8(plane(3), codes),
    ];
    let (low, low2) = (_mm256_unpacklo_epi8(a, b), _mm256_unpacklo_epi8(c, d));
    let (high, high2) = (_mm256_unpackhi_epi8(a, b), _mm256_unpackhi_epi8(c, d));
    [
        _mm256_castsi256_ps(_mm256_unpacklo_epi16(low, low2)),
        _mm256_castsi256_ps(_mm256_unpackhi_epi16(low, low2)),
        _mm256_castsi256_ps(_mm256_unpacklo_epi16(high, high2)),
        _mm256_castsi256_ps(_mm256_unpackhi_epi16(high, high2)),
    ]
}
