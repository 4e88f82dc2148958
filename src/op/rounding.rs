//! Rounding of sums to the stored element type: to nearest, or stochastically.

use crate::element::{DType, Float};
use crate::random::philox;

/// How a sum in `f32` is rounded to a 16-bit element type. For `f32` both variants give the sum itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rounding {
    /// To the nearest number, ties to even.
    #[default]
    Nearest,
    /// To one of the two neighbours at random, the nearer the more likely, so that the expectation is the sum itself. Many
    /// updates that are each too small to change a number under `Nearest` then still add up.
    ///
    /// For element `i` of a row-major matrix, the random word is lane `i % 4` of [`philox`] with key `seed` and counter `(i /
    /// 4, 2)`, where 2 is the third of its four words. Sums at or beyond the largest finite number are rounded as by `Nearest`.
    Stochastic {
        /// Seed of the random words; it gives the same bits on every backend.
        seed: u64,
    },
}

impl Rounding {
    /// The key for [`philox`]; `None` where rounding to `dtype` is not random.
    pub(crate) fn key(self, dtype: DType) -> Option<[u32; 2]> {
        match self {
            Rounding::Stochastic { seed } if dtype != DType::F32 => Some([seed as u32, (seed >> 32) as u32]),
            _ => None,
        }
    }
}

/// The third word of the counter, so that the random words differ from those of a dropout mask with the same seed.
const STREAM: u32 = 2;

/// Four random words, for elements `4·block .. 4·block + 4`.
pub(crate) fn rounding_words(key: [u32; 2], block: u64) -> [u32; 4] {
    philox(key, [block as u32, (block >> 32) as u32, STREAM, 0])
}

/// `value` rounded to one of its two neighbours in `E`: the low bits of `word` are added to the bits that are cut off, and a
/// carry rounds away from zero.
#[inline(always)]
pub(crate) fn round_stochastic<E: Float>(value: f32, word: u32) -> E {
    let (bits, size) = (value.to_bits(), value.abs());
    let rounded = match E::DTYPE {
        DType::F16 if size < 65504.0 => {
            let small = size < 6.103_515_6e-5; // 2⁻¹⁴: below it, f16 are the multiples of 2⁻²⁴
            let cut = if small {
                let parts = (size * 35_184_372_088_832.0) as u32; // in units of 2⁻⁴⁵: 2²¹ of them are 2⁻²⁴
                ((parts + (word & 0x1f_ffff)) >> 21) as f32 * 5.960_464_5e-8
            } else {
                f32::from_bits((bits + (word & 0x1fff)) & 0x7fff_e000)
            };
            cut.copysign(value)
        }
        DType::BF16 if size < 3.389_531_4e38 => f32::from_bits((bits + (word & 0xffff)) & 0xffff_0000),
        _ => value,
    };
    E::from_f32(rounded)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::element::{bf16, f16};

    /// The mean over all values of the low bits of the word.
    fn mean<E: Float>(value: f32) -> f64 {
        let words = 1 << 21;
        (0..words).map(|word| f64::from(round_stochastic::<E>(value, word).to_f32())).sum::<f64>() / f64::from(words)
    }

    #[test]
    fn the_expectation_is_the_number_itself() {
        for value in [1.0f32, 1.000_3, -1.000_3, 3.3, -0.1, 6.2e-5, 1e-5, -3.3e-7, 2e-8, 0.0, 65503.9] {
            let step = |unit: f64, least: f64| (f64::from(value).abs() * unit).max(least);
            let (half, brain) = (mean::<f16>(value), mean::<bf16>(value));
            assert!((half - f64::from(value)).abs() <= step(2f64.powi(-30), 2f64.powi(-45)), "f16: {half}, want {value}");
            assert!((brain - f64::from(value)).abs() <= step(2f64.powi(-30), 0.0), "bf16: {brain}, want {value}");
        }
    }

    #[test]
    fn stochastic_rounding_gives_a_neighbour_and_keeps_stored_numbers() {
        let mut rng = crate::random::Rng::new(1);
        for _ in 0..100_000 {
            let value = f32::from_bits(rng.word());
            if value.is_nan() {
                continue;
            }
            let nearest = f16::from_f32(value);
            let got = round_stochastic::<f16>(value, rng.word());
            assert!(got.to_bits().abs_diff(nearest.to_bits()) <= 1, "{value} became {got}");
            let nearest = bf16::from_f32(value);
            let got = round_stochastic::<bf16>(value, rng.word());
            assert!(got.to_bits().abs_diff(nearest.to_bits()) <= 1, "{value} became {got}");
            assert_eq!(round_stochastic::<bf16>(nearest.to_f32(), rng.word()), nearest);
            let stored = f16::from_bits(rng.word() as u16);
            assert!(stored.is_nan() || round_stochastic::<f16>(stored.to_f32(), rng.word()) == stored);
        }
    }

    #[test]
    fn sums_beyond_the_largest_number_are_rounded_to_nearest() {
        for value in [65504.0, 65519.0, 65520.0, 1e9, f32::INFINITY, f32::NEG_INFINITY, 3.39e38, f32::MAX] {
            for word in [0, u32::MAX] {
                assert_eq!(round_stochastic::<f16>(value, word), f16::from_f32(value));
                let brain = round_stochastic::<bf16>(value, word);
                assert!(value < 3.38e38 || brain == bf16::from_f32(value), "{value}");
            }
        }
        assert!(round_stochastic::<f16>(f32::NAN, 7).is_nan() && round_stochastic::<bf16>(f32::NAN, 7).is_nan());
    }
}
