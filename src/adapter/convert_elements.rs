//! Conversion between the bytes of a file, of any alignment, and `f32`, in parallel.

use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use crate::element::{DType, f16};

/// Elements of a task: large enough to be worth a thread.
pub(crate) const TASK: usize = 1 << 16;
/// Elements of the aligned buffer on the stack.
const RUN: usize = 256;

/// `values[i] = bytes[i]`, exactly.
pub(crate) fn widen(dtype: DType, bytes: &[u8], values: &mut [f32]) {
    let tasks = bytes.par_chunks(TASK * dtype.size()).zip(values.par_chunks_mut(TASK));
    tasks.for_each(|(bytes, values)| match dtype {
        DType::F32 => bytes.as_chunks().0.iter().zip(values).for_each(|(&bytes, value)| *value = f32::from_le_bytes(bytes)),
        DType::BF16 => bytes.as_chunks().0.iter().zip(values).for_each(|(&bytes, value)| {
            *value = f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16); // the upper half
        }),
        DType::F16 => {
            let mut run = [f16::ZERO; RUN];
            for (bytes, values) in bytes.chunks(2 * RUN).zip(values.chunks_mut(RUN)) {
                bytes.as_chunks().0.iter().zip(&mut run).for_each(|(&bytes, value)| *value = f16::from_le_bytes(bytes));
                run[..values.len()].convert_to_f32_slice(values);
            }
        }
    });
}

/// `bytes[i] = values[i]`, rounded to nearest, ties to even. Returns true if every element of `bytes` is finite.
pub(crate) fn round(dtype: DType, values: &[f32], bytes: &mut [u8]) -> bool {
    let tasks = values.par_chunks(TASK).zip(bytes.par_chunks_mut(TASK * dtype.size()));
    let finite = tasks.map(|(values, bytes)| match dtype {
        DType::F32 => {
            bytes.as_chunks_mut().0.iter_mut().zip(values).for_each(|(bytes, value)| *bytes = value.to_le_bytes());
            values.iter().fold(true, |finite, value| finite & value.is_finite())
        }
        DType::F16 => round_f16(values, bytes),
        DType::BF16 => round_bf16(values, bytes),
    });
    finite.reduce(|| true, |one, other| one & other)
}

/// The first finite value that became infinite.
pub(crate) fn overflowing(dtype: DType, values: &[f32], bytes: &[u8]) -> Option<f32> {
    let mut back = vec![0.0; values.len()];
    widen(dtype, bytes, &mut back);
    let mut pairs = values.iter().zip(&back);
    pairs.find(|(value, back)| value.is_finite() && !back.is_finite()).map(|(value, _)| *value)
}

fn round_f16(values: &[f32], bytes: &mut [u8]) -> bool {
    const EXPONENT: u16 = 0x7c00; // all bits of it set: infinite or NaN
    let (mut not_finite, mut run) = (0, [f16::ZERO; RUN]);
    for (values, bytes) in values.chunks(RUN).zip(bytes.chunks_mut(2 * RUN)) {
        run[..values.len()].convert_from_f32_slice(values);
        for (bytes, number) in bytes.as_chunks_mut().0.iter_mut().zip(&run) {
            not_finite |= u16::from(number.to_bits() & EXPONENT == EXPONENT);
            *bytes = number.to_bits().to_le_bytes();
        }
    }
    not_finite == 0
}

/// The upper half of an `f32`, rounded by adding half a unit in the last place, or just less than that if the last place is even.
/// Written without branches, so that the compiler vectorises it.
fn round_bf16(values: &[f32], bytes: &mut [u8]) -> bool {
    const EXPONENT: u16 = 0x7f80;
    const QUIET: u32 = 0x40;
    let mut not_finite = 0;
    for (bytes, value) in bytes.as_chunks_mut().0.iter_mut().zip(values) {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        let number = if value.is_nan() { bits >> 16 | QUIET } else { rounded } as u16;
        not_finite |= u16::from(number & EXPONENT == EXPONENT);
        *bytes = number.to_le_bytes();
    }
    not_finite == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::element::bf16;

    /// Widening and rounding gives back every 16-bit value, at any alignment.
    #[test]
    fn every_16_bit_value_is_restored() {
        let stored: Vec<u8> = std::iter::once(0).chain((0..=u16::MAX).flat_map(u16::to_le_bytes)).collect();
        for (dtype, wide) in [
            (DType::F16, (|bits| f16::from_bits(bits).to_f32()) as fn(u16) -> f32),
            (DType::BF16, |bits| bf16::from_bits(bits).to_f32()),
        ] {
            let mut values = vec![0.0; 1 << 16];
            widen(dtype, &stored[1..], &mut values);
            assert!((0..=u16::MAX).zip(&values).all(|(bits, value)| value.to_bits() == wide(bits).to_bits() || value.is_nan()));
            let mut bytes = vec![0; stored.len()];
            assert!(!round(dtype, &values, &mut bytes[1..]), "{dtype} has infinities");
            let same = |at: usize| bytes[1 + 2 * at..3 + 2 * at] == stored[1 + 2 * at..3 + 2 * at];
            assert!((0..1 << 16).all(|at| same(at) || values[at].is_nan()), "{dtype}");
        }
    }

    /// Ties, numbers beside them, the ends of the range and NaN, as the crate `half` rounds them.
    #[test]
    fn rounding_is_to_nearest_even() {
        let ends = [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff].map(|low| (0..=0xffffu32).map(move |high| high << 16 | low));
        let values: Vec<f32> = ends.into_iter().flatten().map(f32::from_bits).collect();
        for (dtype, want) in [
            (DType::F16, (|value| f16::from_f32(value).to_bits()) as fn(f32) -> u16),
            (DType::BF16, |value| bf16::from_f32(value).to_bits()),
        ] {
            let mut bytes = vec![0; 2 * values.len()];
            round(dtype, &values, &mut bytes);
            let got = bytes.as_chunks().0.iter().map(|&bytes| u16::from_le_bytes(bytes));
            assert!(got.zip(&values).all(|(got, &value)| got == want(value) || value.is_nan()), "{dtype}");
        }
    }

    #[test]
    fn overflow_is_reported() {
        for (dtype, most) in [(DType::F32, f32::MAX), (DType::F16, 65504.0), (DType::BF16, 3.3895314e38)] {
            let mut bytes = vec![0; 4 * dtype.size()];
            assert!(round(dtype, &[1.0, -most, 0.0, most], &mut bytes), "{dtype}");
            assert!(!round(dtype, &[1.0, f32::NAN, 0.0, 1.0], &mut bytes), "{dtype}");
            assert!(!round(dtype, &[1.0, 0.0, 0.0, f32::NEG_INFINITY], &mut bytes), "{dtype}");
        }
        assert!(!round(DType::F16, &[65520.0], &mut [0; 2]) && !round(DType::BF16, &[f32::MAX], &mut [0; 2]));
    }
}
