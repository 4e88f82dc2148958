//! How weights are quantised: the formats, and their tables.

use std::fmt;
use std::str::FromStr;
use std::sync::LazyLock;

use super::VERB;
use crate::error::{Error, Result};

/// The values of NF4's codes, for a block whose largest magnitude is 1.
pub(crate) const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// The values of FP4's codes: a sign, then 0, 1/192 and six fractions.
pub(crate) const FP4: [f32; 16] = {
    let half = [0.0, 0.005_208_333_5, 2.0 / 3.0, 1.0, 1.0 / 3.0, 0.5, 1.0 / 6.0, 0.25];
    let mut all = [0.0; 16];
    let mut i = 0;
    while i < 8 {
        (all[i], all[i + 8]) = (half[i], -half[i]);
        i += 1;
    }
    all
};

/// FP4's codes from the smallest value to the largest. Of the two zeros, code 0 comes first.
const FP4_ORDER: [u8; 16] = [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3];

/// Elements in a group of scales that are quantised themselves.
pub(crate) const SCALES_BLOCK: usize = 256;

/// Elements in a block of Q8_0.
pub(crate) const Q8_0_BLOCK: usize = 32;

/// A number of an `int8` row is `code · absmax · this`.
pub(crate) const ONE_127TH: f32 = 1.0 / 127.0;

/// How a weight is quantised.
///
/// Blocks of 4 bits run through the rows, one after another, as bitsandbytes has them: a block may begin in one row and end in the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum QuantKind {
    /// bitsandbytes' NF4: 4 bits, the quantiles of normal numbers, times the largest magnitude of the block.
    Nf4(Blocks),
    /// bitsandbytes' FP4: 4 bits, a floating-point number, times the largest magnitude of the block.
    Fp4(Blocks),
    /// bitsandbytes' `int8`: whole numbers from -127 to 127, and the largest magnitude of each row in `f32`.
    Int8,
    /// GGUF's Q8_0: whole numbers from -127 to 127 in blocks of 32 along each row, and a scale in `f16` for each block.
    Q8_0,
}

/// The blocks of a 4-bit format, and how their scales are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Blocks {
    /// Elements of a block: 32, 64, 128, … or 4096.
    pub len: usize,
    /// Whether the scales are quantised in their turn, to 8 bits in groups of 256 ("double quantisation"); else they are `f32`.
    pub double: bool,
}

impl Default for Blocks {
    /// 64 elements, and scales of 8 bits, as QLoRA has them.
    fn default() -> Self {
        Self { len: 64, double: true }
    }
}

impl QuantKind {
    /// NF4 in blocks of 64, with scales of 8 bits.
    pub const NF4: Self = Self::Nf4(Blocks { len: 64, double: true });

    /// Errors: [`Error::Value`] unless the length of a block is a power of two from 32 to 4096.
    pub(crate) fn check(self) -> Result<()> {
        let Some((_, blocks)) = self.four_bits() else { return Ok(()) };
        let known = blocks.len.is_power_of_two() && (32..=4096).contains(&blocks.len);
        Error::unless(known, VERB, "block", blocks.len, "a power of two from 32 to 4096")
    }

    /// The values of its codes and its blocks, if it has 4 bits.
    pub(crate) fn four_bits(self) -> Option<(&'static [f32; 16], Blocks)> {
        match self {
            Self::Nf4(blocks) => Some((&NF4, blocks)),
            Self::Fp4(blocks) => Some((&FP4, blocks)),
            Self::Int8 | Self::Q8_0 => None,
        }
    }

    /// Bits of a code.
    pub fn bits(self) -> usize {
        if self.four_bits().is_some() { 4 } else { 8 }
    }

    /// `nf4`, `fp4`, `int8` or `q8_0`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nf4(_) => "nf4",
            Self::Fp4(_) => "fp4",
            Self::Int8 => "int8",
            Self::Q8_0 => "q8_0",
        }
    }
}

impl fmt::Display for QuantKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for QuantKind {
    type Err = Error;

    /// `nf4` and `fp4` are those with blocks of 64 and scales of 8 bits. Errors: [`Error::Value`] for a name that is not known.
    fn from_str(name: &str) -> Result<Self> {
        match name {
            "nf4" => Ok(Self::Nf4(Blocks::default())),
            "fp4" => Ok(Self::Fp4(Blocks::default())),
            "int8" => Ok(Self::Int8),
            "q8_0" => Ok(Self::Q8_0),
            _ => Err(Error::Value { verb: VERB, name: "type", got: name.into(), want: "nf4, fp4, int8 or q8_0".into() }),
        }
    }
}

/// Where the values of a 4-bit format meet, and the codes between: a number gets the code that stands after all thresholds below it.
pub(crate) struct Thresholds {
    pub(crate) between: [f32; 15],
    pub(crate) codes: [u8; 16],
}

impl Thresholds {
    pub(crate) fn of(values: &[f32; 16]) -> Self {
        let codes = if values[0] == 0.0 { FP4_ORDER } else { std::array::from_fn(|code| code as u8) };
        let value = |i: usize| values[codes[i] as usize];
        Self { between: std::array::from_fn(|i| (value(i) + value(i + 1)) / 2.0), codes }
    }

    /// The code of a number from -1 to 1.
    pub(crate) fn code(&self, number: f32) -> u8 {
        let below = self.between.iter().filter(|&&threshold| threshold < number).count();
        self.codes[below]
    }
}

/// The 256 values of bitsandbytes' 8-bit dynamic map, from the smallest to the largest: a sign, up to seven bits that say which power of
/// ten, and a fraction in what is left.
pub(crate) static DYNAMIC_MAP: LazyLock<[f32; 256]> = LazyLock::new(|| {
    let mut values = vec![0.0, 1.0];
    for power in 0..7 {
        let count = 1usize << power;
        let step = (1.0f32 - 0.1) / count as f32;
        // As PyTorch's `linspace` makes them: the lower half from below, the upper half from above.
        let at = |i: usize| {
            if i < count.div_ceil(2) { step.mul_add(i as f32, 0.1) } else { (-step).mul_add((count - i) as f32, 1.0) }
        };
        let scale = 10f64.powi(power - 6) as f32;
        for i in 0..count {
            let mean = (at(i) + at(i + 1)) / 2.0;
            values.extend([scale * mean, -scale * mean]);
        }
    }
    values.sort_by(f32::total_cmp);
    std::array::from_fn(|code| values[code])
});
