//! AVX-512 and AVX2 with FMA and F16C.
#![allow(unsafe_code, reason = "intrinsics: the token proves that the CPU has them; pointers come from references")]

use std::arch::x86_64::{__cpuid_count, _MM_HINT_T0, _mm_prefetch};

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

/// Calls intrinsics. The token `self` proves the features; every pointer comes from a reference to sixteen numbers.
macro_rules! intrinsics {
    ($body:expr) => {
        // SAFETY: `self` proves that the CPU has the features, and references prove that the memory is there.
        unsafe { $body }
    };
}

mod avx2;
mod avx512;

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

/// Prefetches a cache line. Any address is allowed.
#[inline(always)]
fn prefetch<T>(from: &[T], ahead: usize) {
    // SAFETY: a hint, which touches no memory; every x86-64 has it.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(from.as_ptr().wrapping_add(ahead).cast()) };
}
