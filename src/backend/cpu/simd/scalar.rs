//! The fallback for any CPU: a vector is an array. Products and sums are rounded separately, because fused multiply-add without
//! hardware is a slow library call.

use super::{Kernel, LANES, Lanes, Simd};
use crate::element::{bf16, f16};

/// The scalar unit, which any CPU has.
#[derive(Clone, Copy)]
pub(crate) struct Scalar;

/// `[value(0), …, value(15)]`. The compiler has less to do with this loop than with [`std::array::from_fn`].
#[inline(always)]
fn lanes<T: Copy + Default>(value: impl Fn(usize) -> T) -> Lanes<T> {
    let mut lanes = [T::default(); LANES];
    for (i, lane) in lanes.iter_mut().enumerate() {
        *lane = value(i);
    }
    lanes
}

// Without hardware, converting f16 takes dozens of instructions a number: functions of their own keep them out of every kernel.

#[inline(never)]
fn widen_f16(from: &Lanes<u16>) -> Lanes<f32> {
    lanes(|i| f16::from_bits(from[i]).to_f32())
}

#[inline(never)]
fn round_to_f16(from: &Lanes<f32>) -> Lanes<u16> {
    lanes(|i| f16::from_f32(from[i]).to_bits())
}

#[inline(never)]
fn round_to_bf16(from: &Lanes<f32>) -> Lanes<u16> {
    lanes(|i| bf16::from_f32(from[i]).to_bits())
}

impl Simd for Scalar {
    type V = Lanes<f32>;
    const REGISTERS: usize = 4;

    #[inline(never)] // or every caller has a copy
    fn run<K: Kernel>(self, kernel: K) -> K::Out {
        kernel.run(self)
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::V {
        [value; LANES]
    }
    #[inline(always)]
    fn load(self, from: &Lanes<f32>) -> Self::V {
        *from
    }
    #[inline(always)]
    fn store(self, value: Self::V, to: &mut Lanes<f32>) {
        *to = value;
    }
    #[inline(always)]
    fn load_f16(self, from: &Lanes<u16>) -> Self::V {
        widen_f16(from)
    }
    #[inline(always)]
    fn store_f16(self, value: Self::V, to: &mut Lanes<u16>) {
        *to = round_to_f16(&value);
    }
    #[inline(always)]
    fn load_bf16(self, from: &Lanes<u16>) -> Self::V {
        lanes(|i| f32::from_bits(u32::from(from[i]) << 16))
    }
    #[inline(always)]
    fn store_bf16(self, value: Self::V, to: &mut Lanes<u16>) {
        *to = round_to_bf16(&value);
    }
    #[inline(always)]
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        lanes(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| a[i] / b[i])
    }
    #[inline(always)]
    fn sqrt(self, a: Self::V) -> Self::V {
        lanes(|i| a[i].sqrt())
    }
    #[inline(always)]
    fn relu(self, a: Self::V) -> Self::V {
        lanes(|i| if a[i] <= 0.0 { 0.0 } else { a[i] })
    }
    #[inline(always)]
    fn gate(self, gate: Self::V, a: Self::V) -> Self::V {
        lanes(|i| if gate[i] > 0.0 { a[i] } else { 0.0 })
    }
    #[inline(always)]
    fn if_equal(self, a: Self::V, b: Self::V, equal: Self::V, other: Self::V) -> Self::V {
        lanes(|i| if a[i] == b[i] { equal[i] } else { other[i] })
    }
    #[inline(always)]
    fn flush(self, a: Self::V) -> Self::V {
        lanes(|i| if a[i].abs() < f32::MIN_POSITIVE { 0.0 } else { a[i] })
    }
}
