//! A quantised weight as kernels read it.

use std::ops::Range;

use super::kind::{ONE_127TH, Q8_0_BLOCK, QuantKind, SCALES_BLOCK};
use crate::element::f16;
use crate::tensor::Shape;

/// The codes and scales of a weight `n×k`, with as many of each as it needs.
#[derive(Clone, Copy)]
pub(crate) struct QuantView<'a> {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) kind: QuantKind,
    pub(crate) codes: &'a [u8],
    pub(crate) scales: ScalesView<'a>,
}

/// See [`Scales`](super::Scales).
#[derive(Clone, Copy)]
pub(crate) enum ScalesView<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Double { codes: &'a [u8], absmax: &'a [f32], map: &'a [f32], offset: f32 },
}

impl ScalesView<'_> {
    #[inline(always)]
    fn at(self, i: usize) -> f32 {
        match self {
            Self::F32(scales) => scales[i],
            Self::F16(scales) => scales[i].to_f32(),
            Self::Double { codes, absmax, map, offset } => map[codes[i] as usize] * absmax[i / SCALES_BLOCK] + offset,
        }
    }
}

impl<'a> QuantView<'a> {
    pub(super) fn new(shape: Shape, kind: QuantKind, codes: &'a [u8], scales: ScalesView<'a>) -> Self {
        Self { rows: shape.rows, cols: shape.cols, kind, codes, scales }
    }

    /// The `i`-th scale, whatever it is multiplied with.
    #[inline(always)]
    pub(crate) fn scale(&self, i: usize) -> f32 {
        self.scales.at(i)
    }

    /// `to = W[row][cols]`, element by element: what kernels must give to the bit.
    pub(crate) fn dequantise(&self, row: usize, cols: Range<usize>, to: &mut [f32]) {
        let first = row * self.cols;
        for (to, col) in to.iter_mut().zip(cols) {
            let at = first + col;
            *to = match self.kind {
                QuantKind::Nf4(_) | QuantKind::Fp4(_) => self.four_bits(at),
                QuantKind::Int8 => self.codes[at] as i8 as f32 * self.scale(row) * ONE_127TH,
                QuantKind::Q8_0 => {
                    let block = row * self.cols.div_ceil(Q8_0_BLOCK) + col / Q8_0_BLOCK;
                    self.codes[at] as i8 as f32 * self.scale(block)
                }
            };
        }
    }

    fn four_bits(&self, at: usize) -> f32 {
        let Some((values, blocks)) = self.kind.four_bits() else { return 0.0 };
        let two = self.codes[at / 2];
        let code = if at.is_multiple_of(2) { two >> 4 } else { two & 15 };
        values[code as usize] * self.scale(at / blocks.len)
    }
}
