//! 16-bit floats, and roundings that Rust's arithmetic lacks.

/// Exact.
pub(crate) fn from_f16(bits: u16) -> f32 {
    let sign = u32::from(bits >> 15) << 31;
    let (exponent, fraction) = (u32::from(bits >> 10) & 31, u32::from(bits) & 0x3ff);
    match exponent {
        0 => f32::from_bits(sign | (fraction as f32 * 2f32.powi(-24)).to_bits()),
        31 => f32::from_bits(sign | 0x7f80_0000 | fraction << 13),
        _ => f32::from_bits(sign | (exponent + 112) << 23 | fraction << 13),
    }
}

/// Rounds to nearest, ties to even.
pub(crate) fn to_f16(value: f32) -> u16 {
    let sign = ((value.to_bits() >> 31) as u16) << 15;
    let magnitude = value.abs();
    if magnitude.is_nan() {
        return 0x7fff;
    }
    // 65520 lies half way between the largest f16 and the next power of two, and is the first to become infinite.
    if magnitude >= 65520.0 {
        return sign | 0x7c00;
    }
    // Below 2⁻¹⁴ the f16 are multiples of 2⁻²⁴; the product is exact.
    if magnitude < 2f32.powi(-14) {
        return sign | (magnitude * 2f32.powi(24)).round_ties_even() as u16;
    }
    let bits = magnitude.to_bits();
    let rounded = bits + 0xfff + (bits >> 13 & 1);
    sign | ((rounded >> 13) - (112 << 10)) as u16
}

/// Exact.
pub(crate) fn from_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Rounds to nearest, ties to even.
pub(crate) fn to_bf16(value: f32) -> u16 {
    if value.is_nan() {
        return 0x7fff;
    }
    let bits = value.to_bits();
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

/// Rounds to tf32's 11 significant bits, ties away from zero.
pub(crate) fn to_tf32(value: f32) -> f32 {
    if value.is_finite() { cut_to_tf32(f32::from_bits(value.to_bits() + 0x1000)) } else { value }
}

/// The bits of an `f32` that a tf32 product reads.
pub(crate) fn cut_to_tf32(value: f32) -> f32 {
    f32::from_bits(value.to_bits() & !0x1fff)
}

/// `a·b + c`, rounded once, to nearest; `f32::mul_add` is a library call unless the target has FMA.
pub(crate) fn fma(a: f32, b: f32, c: f32) -> f32 {
    fma_odd(a, b, c) as f32
}

/// `a·b + c`, rounded towards -∞.
pub(crate) fn fma_down(a: f32, b: f32, c: f32) -> f32 {
    let exact = fma_odd(a, b, c);
    let nearest = exact as f32;
    if f64::from(nearest) > exact { nearest.next_down() } else { nearest }
}

/// `a·b + c` in `f64`, rounded to odd: the result is on the same side of every `f32`, and of the middle of two, as the exact
/// value, so that rounding it again equals rounding once.
fn fma_odd(a: f32, b: f32, c: f32) -> f64 {
    let (product, c) = (f64::from(a) * f64::from(b), f64::from(c)); // 24 + 24 bits: exact
    let sum = product + c;
    let from_c = sum - product;
    let lost = (product - (sum - from_c)) + (c - from_c);
    let inexact = lost.abs() > 0.0; // false for NaN, which infinities give
    let even = sum.to_bits() & 1 == 0;
    let away = (lost > 0.0) == (sum > 0.0);
    let odd = if away { sum.to_bits().wrapping_add(1) } else { sum.to_bits().wrapping_sub(1) };
    if inexact && even { f64::from_bits(odd) } else { sum }
}

/// Numbers below the smallest normal one become zero.
pub(crate) fn flush(value: f32) -> f32 {
    if value.is_subnormal() { 0f32.copysign(value) } else { value }
}

/// Clamps to 0..1; NaN becomes 0.
pub(crate) fn saturate(value: f32) -> f32 {
    if value.is_nan() { 0.0 } else { value.clamp(0.0, 1.0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f16_and_bf16_survives_the_way_to_f32_and_back() {
        for bits in 0..=u16::MAX {
            let (half, brain) = (from_f16(bits), from_bf16(bits));
            assert!(half.is_nan() || to_f16(half) == bits, "{bits:#x}");
            assert!(brain.is_nan() || to_bf16(brain) == bits, "{bits:#x}");
        }
    }

    #[test]
    fn fma_rounds_once() {
        let mut state = 1u64;
        let mut number = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            // Similar exponents, so that sums cancel and every rounding occurs.
            f32::from_bits((state >> 32) as u32 & 0x83ff_ffff | 0x3e00_0000)
        };
        for _ in 0..1_000_000 {
            let (a, b, c) = (number(), number(), number());
            let (want, got) = (a.mul_add(b, c), fma(a, b, c));
            assert!(want == got, "{a}·{b} + {c} = {want}, not {got}");
            assert!(fma_down(a, b, c) == want || fma_down(a, b, c) == want.next_down());
        }
        for (a, b, c) in [(1e30, 1e30, 1.0), (f32::INFINITY, 0.0, 1.0), (1e-30, 1e-20, -1e-45), (1.0, 1.0, -1.0)] {
            assert_eq!(fma(a, b, c).to_bits(), a.mul_add(b, c).to_bits(), "{a}·{b} + {c}");
        }
    }

    #[test]
    fn half_way_cases_go_to_the_even_neighbour() {
        for bits in 0..0x7bff_u16 {
            let middle = ((f64::from(from_f16(bits)) + f64::from(from_f16(bits + 1))) / 2.0) as f32;
            assert_eq!(to_f16(middle), bits + (bits & 1), "{bits:#x}");
            assert_eq!(to_f16(middle.next_down()), bits, "{bits:#x}");
            assert_eq!(to_f16(middle.next_up()), bits + 1, "{bits:#x}");
        }
        assert_eq!(to_bf16(f32::from_bits(0x3f80_8000)), 0x3f80);
        assert_eq!(to_bf16(f32::from_bits(0x3f81_8000)), 0x3f82);
        assert_eq!((to_f16(65520.0), to_bf16(f32::MAX)), (0x7c00, 0x7f80));
    }
}
