//! A quantised weight in host memory, as files have it.

use super::kind::{Q8_0_BLOCK, QuantKind, SCALES_BLOCK};
use super::view::{QuantView, ScalesView};
use super::{VERB, encode};
use crate::element::{Float, f16};
use crate::error::{Error, Result};
use crate::tensor::Shape;

/// A quantised weight `n×k` in host memory: as many codes and scales as its shape and its format ask for.
#[derive(Clone, Debug, PartialEq)]
pub struct HostQuantised {
    shape: Shape,
    kind: QuantKind,
    codes: Vec<u8>,
    scales: Scales,
}

/// The scales of a quantised weight.
#[derive(Clone, Debug, PartialEq)]
pub enum Scales {
    /// Of 4-bit blocks, or of `int8` rows.
    F32(Vec<f32>),
    /// Of Q8_0.
    F16(Vec<f16>),
    /// Scales that are quantised themselves: `map[code] · absmax[i / 256] + offset`, each operation rounded.
    Double {
        /// A code for each block.
        codes: Vec<u8>,
        /// For each 256 codes.
        absmax: Vec<f32>,
        /// The values of the codes.
        map: Box<[f32; 256]>,
        /// The mean of the scales.
        offset: f32,
    },
}

/// How many bytes of codes, scales, and scales of scales.
pub(crate) struct Counts {
    pub(crate) codes: usize,
    pub(crate) scales: usize,
    pub(crate) nested: usize,
}

impl QuantKind {
    /// How much a weight of this shape has. Errors: [`Error::TooLarge`]; [`Error::Value`] for blocks that do not exist.
    pub(crate) fn counts(self, shape: Shape) -> Result<Counts> {
        self.check()?;
        let elements = shape.elements()?;
        let (codes, scales) = match self {
            Self::Nf4(blocks) | Self::Fp4(blocks) => (elements.div_ceil(2), elements.div_ceil(blocks.len)),
            Self::Int8 => (elements, shape.rows),
            Self::Q8_0 => (elements, shape.rows * shape.cols.div_ceil(Q8_0_BLOCK)),
        };
        Ok(Counts { codes, scales, nested: scales.div_ceil(SCALES_BLOCK) })
    }
}

impl HostQuantised {
    /// From codes and scales. Of 4 bits, element `2j` is in the upper half of byte `j`; 8 bits are signed.
    ///
    /// Errors: [`Error::Value`] if there are not as many as shape and format ask for, or a scale is not finite.
    pub fn new(shape: impl Into<Shape>, kind: QuantKind, codes: Vec<u8>, scales: Scales) -> Result<Self> {
        let shape = shape.into();
        let counts = kind.counts(shape)?;
        has("codes", codes.len(), counts.codes)?;
        let double = kind.four_bits().is_some_and(|(_, blocks)| blocks.double);
        match (&scales, kind) {
            (Scales::F32(scales), QuantKind::Nf4(_) | QuantKind::Fp4(_) | QuantKind::Int8) if !double => {
                has("scales", scales.len(), counts.scales)?;
                finite("scales", scales)?;
            }
            (Scales::F16(scales), QuantKind::Q8_0) => {
                has("scales", scales.len(), counts.scales)?;
                Error::unless(scales.iter().all(|scale| scale.is_finite()), VERB, "scales", "not finite", "finite numbers")?;
            }
            (Scales::Double { codes, absmax, map, offset }, _) if double => {
                has("scales", codes.len(), counts.scales)?;
                has("scales of scales", absmax.len(), counts.nested)?;
                finite("scales of scales", absmax)?;
                finite("map", &map[..])?;
                finite("offset", &[*offset])?;
            }
            _ => return Err(value("scales", "of another type".into(), format!("those of {kind}"))),
        }
        Ok(Self { shape, kind, codes, scales })
    }

    /// Quantises numbers, row by row. Errors: [`Error::Value`] for a number that is not finite, or too large for the format's scales, or if
    /// there are not `rows · cols`.
    pub fn quantise<T: Float>(shape: impl Into<Shape>, numbers: &[T], kind: QuantKind) -> Result<Self> {
        let shape = shape.into();
        kind.check()?;
        has("numbers", numbers.len(), shape.elements()?)?;
        if let Some(at) = numbers.iter().position(|number| !number.to_f32().is_finite()) {
            let (row, col) = (at / shape.cols, at % shape.cols);
            return Err(value("weight", format!("{} at ({row}, {col})", numbers[at].to_f32()), "finite numbers".into()));
        }
        let (codes, scales) = match kind {
            QuantKind::Nf4(_) | QuantKind::Fp4(_) => encode::four_bits(numbers, kind),
            QuantKind::Int8 if numbers.is_empty() => (Vec::new(), Scales::F32(vec![0.0; shape.rows])),
            QuantKind::Int8 => encode::int8(numbers, shape.cols),
            QuantKind::Q8_0 => encode::q8_0(numbers, shape.cols)?,
        };
        Self::new(shape, kind, codes, scales)
    }

    /// The numbers, row by row: made in `f32`, and rounded once.
    pub fn dequantise<T: Float>(&self) -> Vec<T> {
        let mut to = vec![T::default(); self.shape.rows * self.shape.cols];
        encode::dequantise(self.view(), &mut to);
        to
    }

    /// `n×k`
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// How it is quantised.
    pub fn kind(&self) -> QuantKind {
        self.kind
    }

    /// The codes: two in a byte, or signed bytes.
    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// The scales.
    pub fn scales(&self) -> &Scales {
        &self.scales
    }

    /// To be read.
    pub(crate) fn view(&self) -> QuantView<'_> {
        let scales = match &self.scales {
            Scales::F32(scales) => ScalesView::F32(scales),
            Scales::F16(scales) => ScalesView::F16(scales),
            Scales::Double { codes, absmax, map, offset } => ScalesView::Double { codes, absmax, map: &map[..], offset: *offset },
        };
        QuantView::new(self.shape, self.kind, &self.codes, scales)
    }
}

fn value(name: &'static str, got: String, want: String) -> Error {
    Error::Value { verb: VERB, name, got, want: want.into() }
}

fn has(name: &'static str, len: usize, want: usize) -> Result<()> {
    if len == want { Ok(()) } else { Err(value(name, len.to_string(), format!("{want} for the shape"))) }
}

fn finite(name: &'static str, numbers: &[f32]) -> Result<()> {
    Error::unless(numbers.iter().all(|number| number.is_finite()), VERB, name, "not finite", "finite numbers")
}
