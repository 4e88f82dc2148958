//! Multiply-adds in registers: as many chains as hide the latency, nothing else.

use std::hint::black_box;

use super::best_rate;

/// Chains of dependent multiply-adds: two ports of latency four or five need ten, and AVX2 has sixteen registers for them and
/// two operands.
const CHAINS: usize = 12;

/// FLOP/s of the widest unit this CPU has.
pub fn flop_rate(tries: usize, threads: usize) -> f64 {
    let (lanes, run) = widest();
    let steps = 400_000u32; // about a millisecond: short enough to be left alone by other programs
    best_rate(tries, threads, |_| {
        black_box(run(black_box(steps)));
        2.0 * f64::from(steps) * (CHAINS * lanes) as f64
    })
}

/// The number of lanes, and a loop of that many steps of all the chains.
fn widest() -> (usize, fn(u32) -> f32) {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            #[allow(unsafe_code, reason = "a function compiled for AVX-512")]
            // SAFETY: the CPU has it.
            return (16, |steps| unsafe { x86::avx512(steps) });
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            #[allow(unsafe_code, reason = "a function compiled for AVX2 and FMA")]
            // SAFETY: the CPU has both.
            return (8, |steps| unsafe { x86::avx2(steps) });
        }
    }
    (16, portable)
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    use super::CHAINS;

    #[target_feature(enable = "avx512f")]
    pub fn avx512(steps: u32) -> f32 {
        let (factor, term) = (_mm512_set1_ps(black_box(0.999)), _mm512_set1_ps(black_box(0.001)));
        let mut chains = [term; CHAINS];
        for _ in 0..steps {
            for chain in &mut chains {
                *chain = _mm512_fmadd_ps(*chain, factor, term);
            }
        }
        let mut sum = chains[0];
        for chain in &chains[1..] {
            sum = _mm512_add_ps(sum, *chain);
        }
        _mm512_reduce_add_ps(sum)
    }

    #[target_feature(enable = "avx2,fma")]
    pub fn avx2(steps: u32) -> f32 {
        let (factor, term) = (_mm256_set1_ps(black_box(0.999)), _mm256_set1_ps(black_box(0.001)));
        let mut chains = [term; CHAINS];
        for _ in 0..steps {
            for chain in &mut chains {
                *chain = _mm256_fmadd_ps(*chain, factor, term);
            }
        }
        let mut sum = chains[0];
        for chain in &chains[1..] {
            sum = _mm256_add_ps(sum, *chain);
        }
        _mm256_cvtss_f32(sum)
    }
}

/// Whatever the compiler makes of it.
fn portable(steps: u32) -> f32 {
    let [factor, term] = [0.999f32, 0.001].map(black_box);
    let mut chains = [[term; 16]; CHAINS];
    for _ in 0..steps {
        for lane in chains.as_flattened_mut() {
            *lane = lane.mul_add(factor, term);
        }
    }
    chains.as_flattened().iter().sum()
}
