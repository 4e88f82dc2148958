//! Quantising and dequantising on the host, on all threads. Each block is one thread's, so the bits do not depend on how many there are.

use rayon::prelude::*;

use super::kind::{Blocks, DYNAMIC_MAP, Q8_0_BLOCK, QuantKind, SCALES_BLOCK, Thresholds};
use super::view::QuantView;
use super::{Scales, VERB};
use crate::element::{Float, f16};
use crate::error::{Error, Result};

/// The least that a block's largest magnitude counts as: its reciprocal is finite.
const LEAST: f32 = 1e-38;

/// Codes of 4 bits, two in a byte, the first in the upper half.
///
/// As bitsandbytes has it: a number is multiplied with the reciprocal of its block's largest magnitude; in a last block that is not full
/// it is divided by it.
pub(super) fn four_bits<T: Float>(numbers: &[T], kind: QuantKind) -> (Vec<u8>, Scales) {
    let Some((values, Blocks { len, double })) = kind.four_bits() else { return (Vec::new(), Scales::F32(Vec::new())) };
    let (thresholds, mut codes) = (Thresholds::of(values), vec![0u8; numbers.len().div_ceil(2)]);
    let blocks = numbers.par_chunks(len).zip(codes.par_chunks_mut(len / 2));
    let scales: Vec<f32> = blocks
        .map(|(block, codes)| {
            let absmax = largest(block);
            let (is_whole, least) = (block.len() == len, absmax.max(LEAST));
            let code = |number: &T| {
                let scaled = if is_whole { number.to_f32() * (1.0 / least) } else { number.to_f32() / least };
                thresholds.code(scaled.clamp(-1.0, 1.0))
            };
            for (two, to) in block.chunks(2).zip(codes) {
                *to = code(&two[0]) << 4 | two.get(1).map_or(thresholds.code(0.0), code);
            }
            if is_whole { absmax } else { least }
        })
        .collect();
    (codes, if double { quantise_scales(&scales) } else { Scales::F32(scales) })
}

fn largest<T: Float>(numbers: &[T]) -> f32 {
    numbers.iter().fold(0.0, |most, number| number.to_f32().abs().max(most))
}

/// Scales less their mean, in 8 bits, in groups of 256.
fn quantise_scales(scales: &[f32]) -> Scales {
    let offset = (scales.iter().map(|&scale| f64::from(scale)).sum::<f64>() / scales.len().max(1) as f64) as f32;
    let (map, mut codes, mut absmax) = (&*DYNAMIC_MAP, Vec::with_capacity(scales.len()), Vec::new());
    for group in scales.chunks(SCALES_BLOCK) {
        let most = group.iter().fold(0.0f32, |most, scale| (scale - offset).abs().max(most));
        codes.extend(group.iter().map(|scale| nearest(map, ((scale - offset) / most.max(LEAST)).clamp(-1.0, 1.0))));
        absmax.push(most);
    }
    Scales::Double { codes, absmax, map: Box::new(*map), offset }
}

/// The code whose value is nearest: of two that are as near, the lower.
fn nearest(map: &[f32; 256], number: f32) -> u8 {
    let above = map.partition_point(|&value| value < number);
    let nearer_below = above > 0 && (above == 256 || number - map[above - 1] <= map[above] - number);
    (above - nearer_below as usize) as u8
}

/// Rows of whole numbers: `round(127 · x / absmax)`, ties to even.
pub(super) fn int8<T: Float>(numbers: &[T], cols: usize) -> (Vec<u8>, Scales) {
    let mut codes = vec![0u8; numbers.len()];
    let rows = numbers.par_chunks(cols.max(1)).zip(codes.par_chunks_mut(cols.max(1)));
    let scales = rows.map(|(row, codes)| {
        let absmax = largest(row);
        whole_numbers(row, 127.0 / absmax, f32::round_ties_even, codes);
        absmax
    });
    let scales = scales.collect();
    (codes, Scales::F32(scales))
}

/// Blocks of whole numbers along rows: `round(x / d)` where `d` is the largest magnitude / 127, ties away from zero, as GGUF has it.
pub(super) fn q8_0<T: Float>(numbers: &[T], cols: usize) -> Result<(Vec<u8>, Scales)> {
    let mut codes = vec![0u8; numbers.len()];
    let rows = numbers.par_chunks(cols.max(1)).zip(codes.par_chunks_mut(cols.max(1)));
    let blocks = rows.flat_map_iter(|(row, codes)| row.chunks(Q8_0_BLOCK).zip(codes.chunks_mut(Q8_0_BLOCK)));
    let scales: Vec<f16> = blocks
        .map(|(block, codes)| {
            let d = largest(block) / 127.0;
            whole_numbers(block, if d == 0.0 { 0.0 } else { 1.0 / d }, f32::round, codes);
            f16::from_f32(d)
        })
        .collect();
    let fits = scales.iter().all(|scale| scale.is_finite());
    Error::unless(fits, VERB, "weight", "a number beyond 8 million", "smaller ones, whose scales are `f16`s")?;
    Ok((codes, Scales::F16(scales)))
}

/// `codes = round(factor · x)`, from -127 to 127
fn whole_numbers<T: Float>(numbers: &[T], factor: f32, round: fn(f32) -> f32, codes: &mut [u8]) {
    for (number, code) in numbers.iter().zip(codes) {
        let number = number.to_f32();
        // A factor may be infinite where all numbers are tiny, or zero.
        let scaled = if number == 0.0 { 0.0 } else { round(number * factor) };
        *code = scaled.clamp(-127.0, 127.0) as i8 as u8;
    }
}

/// `to = W`, row by row, rounded once.
pub(super) fn dequantise<T: Float>(w: QuantView<'_>, to: &mut [T]) {
    to.par_chunks_mut(w.cols.max(1)).enumerate().for_each(|(row, to)| {
        let mut line = [0.0; 256];
        for (piece, to) in to.chunks_mut(line.len()).enumerate() {
            let first = piece * line.len();
            w.dequantise(row, first..first + to.len(), &mut line[..to.len()]);
            to.iter_mut().zip(&line).for_each(|(to, &number)| *to = T::from_f32(number));
        }
    });
}
