//! AVX-512 and AVX2 with FMA and F16C.
#![allow(unsafe_code, reason = "intrinsics: the token proves that the CPU has them; pointers come from references")]

use std::arch::x86_64::*;

use super::{Kernel, LANES, Lanes, Simd};
use crate::element::{DType, Float};

/// Proof that this CPU has AVX-512 F, BW, DQ and VL.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

/// Proof that this CPU has AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx512 {
    pub(crate) fn new() -> Option<Self> {
        let found = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        (found && Avx2::new().is_some()).then_some(Self(()))
    }
}

impl Avx2 {
    pub(crate) fn new() -> Option<Self> {
        let found = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        found.then_some(Self(()))
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn frame_avx512<K: Kernel>(s: Avx512, kernel: K) -> K::Out {
    kernel.run(s)
}

#[target_feature(enable = "avx2,fma,f16c")]
fn frame_avx2<K: Kernel>(s: Avx2, kernel: K) -> K::Out {
    kernel.run(s)
}

/// Calls intrinsics. The token `self` proves the features; every pointer comes from a reference to sixteen numbers.
macro_rules! intrinsics {
    ($body:expr) => {
        // SAFETY: `self` proves that the CPU has the features, and references prove that the memory is there.
        unsafe { $body }
    };
}

impl Simd for Avx512 {
    type V = __m512;
    const REGISTERS: usize = 32;

    #[inline]
    fn run<K: Kernel>(self, kernel: K) -> K::Out {
        intrinsics!(frame_avx512(self, kernel))
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
    fn prefetch<T>(self, from: &[T], ahead: usize) {
        prefetch(from, ahead);
    }
}

/// Bytes of levels 1, 2 and 3 of the data cache, by `cpuid`; 0 for a missing level.
pub(crate) fn cache_levels() -> Option<[usize; 3]> {
    // SAFETY: every x86-64 CPU has the instruction; a leaf that it does not know reads as another one, or as zeros.
    #[allow(unused_unsafe, reason = "safe in newer compilers")]
    let leaf = |leaf: u32, sub: u32| unsafe { __cpuid_count(leaf, sub) };
    // AMD describes its caches in another leaf, in the same format.
    let amd = leaf(0x8000_0000, 0).eax >= 0x8000_001d && leaf(0x8000_001d, 0).eax & 31 != 0;
    if !amd && leaf(0, 0).eax < 4 {
        return None;
    }
    let mut levels = [0; 3];
    for sub in 0..8 {
        let cache = leaf(if amd { 0x8000_001d } else { 4 }, sub);
        let (kind, level) = (cache.eax & 31, (cache.eax >> 5 & 7) as usize);
        let field = |shift: u32, bits: u32| (cache.ebx >> shift & ((1 << bits) - 1)) as usize + 1;
        match kind {
            0 => break,
            // Data cache, or unified.
            1 | 3 if (1..=3).contains(&level) => {
                levels[level - 1] = field(22, 10) * field(12, 10) * field(0, 12) * (cache.ecx as usize + 1);
            }
            _ => {}
        }
    }
    (levels != [0; 3]).then_some(levels)
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

/// Prefetches a cache line. Any address is allowed.
#[inline(always)]
fn prefetch<T>(from: &[T], ahead: usize) {
    // SAFETY: a hint, which touches no memory; every x86-64 has it.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(from.as_ptr().wrapping_add(ahead).cast()) };
}

/// The sums of lanes `i` and `i + 4`.
#[inline]
#[target_feature(enable = "avx2")]
fn add_halves(value: __m256) -> [f32; 4] {
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

    /// The upper sixteen bits of each lane, rounded as in [`Avx512::store_bf16`].
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
        intrinsics!(frame_avx2(self, kernel))
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
