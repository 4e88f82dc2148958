//! NEON on 64-bit Arm: a vector is four registers of four lanes. 16-bit floats are converted lane by lane.
#![allow(unsafe_code, reason = "intrinsics: the token proves that the CPU has them; pointers come from references")]

use std::arch::aarch64::*;

use super::{Kernel, Lanes, Scalar, Simd};

/// Proof that this CPU has NEON.
#[derive(Clone, Copy)]
pub(crate) struct Neon(());

impl Neon {
    pub(crate) fn new() -> Option<Self> {
        std::arch::is_aarch64_feature_detected!("neon").then_some(Self(()))
    }
}

#[target_feature(enable = "neon")]
fn frame<K: Kernel>(s: Neon, kernel: K) -> K::Out {
    kernel.run(s)
}

/// Evaluates an expression for each of the four registers.
macro_rules! quarters {
    (|$i:ident| $body:expr) => {
        // SAFETY: `self` proves that the CPU has NEON, and references prove that the memory is there.
        std::array::from_fn(|$i| unsafe { $body })
    };
}

impl Simd for Neon {
    type V = [float32x4_t; 4];
    const REGISTERS: usize = 8;

    #[inline]
    fn run<K: Kernel>(self, kernel: K) -> K::Out {
        // SAFETY: `self` proves that the CPU has NEON.
        unsafe { frame(self, kernel) }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::V {
        quarters!(|_i| vdupq_n_f32(value))
    }
    #[inline(always)]
    fn load(self, from: &Lanes<f32>) -> Self::V {
        quarters!(|i| vld1q_f32(from[4 * i..4 * i + 4].as_ptr()))
    }
    #[inline(always)]
    fn store(self, value: Self::V, to: &mut Lanes<f32>) {
        let [_, _, _, _]: [(); 4] = quarters!(|i| vst1q_f32(to[4 * i..4 * i + 4].as_mut_ptr(), value[i]));
    }
    #[inline(always)]
    fn load_f16(self, from: &Lanes<u16>) -> Self::V {
        self.load(&Scalar.load_f16(from))
    }
    #[inline(always)]
    fn store_f16(self, value: Self::V, to: &mut Lanes<u16>) {
        let mut lanes = [0.0; 16];
        self.store(value, &mut lanes);
        Scalar.store_f16(lanes, to);
    }
    #[inline(always)]
    fn load_bf16(self, from: &Lanes<u16>) -> Self::V {
        self.load(&Scalar.load_bf16(from))
    }
    #[inline(always)]
    fn store_bf16(self, value: Self::V, to: &mut Lanes<u16>) {
        let mut lanes = [0.0; 16];
        self.store(value, &mut lanes);
        Scalar.store_bf16(lanes, to);
    }
    #[inline(always)]
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        quarters!(|i| vfmaq_f32(c[i], a[i], b[i]))
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        quarters!(|i| vaddq_f32(a[i], b[i]))
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        quarters!(|i| vmulq_f32(a[i], b[i]))
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        quarters!(|i| vdivq_f32(a[i], b[i]))
    }
    #[inline(always)]
    fn sqrt(self, a: Self::V) -> Self::V {
        quarters!(|i| vsqrtq_f32(a[i]))
    }
    /// FMAX returns NaN if an operand is NaN, and +0 for +0 and -0.
    #[inline(always)]
    fn relu(self, a: Self::V) -> Self::V {
        quarters!(|i| vmaxq_f32(a[i], vdupq_n_f32(0.0)))
    }
    #[inline(always)]
    fn gate(self, gate: Self::V, a: Self::V) -> Self::V {
        quarters!(|i| {
            let open = vcgtq_f32(gate[i], vdupq_n_f32(0.0));
            vreinterpretq_f32_u32(vandq_u32(open, vreinterpretq_u32_f32(a[i])))
        })
    }
    #[inline(always)]
    fn if_equal(self, a: Self::V, b: Self::V, equal: Self::V, other: Self::V) -> Self::V {
        quarters!(|i| vbslq_f32(vceqq_f32(a[i], b[i]), equal[i], other[i]))
    }
    /// Clears the lanes with an exponent of zero, which are subnormal or zero.
    #[inline(always)]
    fn flush(self, a: Self::V) -> Self::V {
        quarters!(|i| {
            let bits = vreinterpretq_u32_f32(a[i]);
            let normal = vtstq_u32(bits, vdupq_n_u32(0x7f80_0000));
            vreinterpretq_f32_u32(vandq_u32(bits, normal))
        })
    }
}
