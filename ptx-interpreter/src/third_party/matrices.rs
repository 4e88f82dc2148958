//! Matrices of whole numbers, and their bytes in each element type.

use crate::float;

/// A row-major matrix.
#[derive(Clone)]
pub(super) struct Matrix {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) values: Vec<f32>,
}

impl Matrix {
    pub(super) fn zeros(rows: usize, cols: usize) -> Self {
        Self { rows, cols, values: vec![0.0; rows * cols] }
    }

    /// Whole numbers around zero, `span` different ones.
    pub(super) fn random(rows: usize, cols: usize, span: u64, seed: u64) -> Self {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) % span) as f32 - (span / 2) as f32
        };
        Self { rows, cols, values: (0..rows * cols).map(|_| next()).collect() }
    }

    pub(super) fn transposed(&self) -> Self {
        let values = (0..self.rows * self.cols).map(|at| self.values[at % self.rows * self.cols + at / self.rows]);
        Self { rows: self.cols, cols: self.rows, values: values.collect() }
    }

    pub(super) fn map(mut self, f: impl Fn(f32) -> f32) -> Self {
        self.values.iter_mut().for_each(|value| *value = f(*value));
        self
    }

    pub(super) fn times(&self, other: &Self) -> Self {
        let mut product = Self::zeros(self.rows, other.cols);
        for (row, sums) in self.values.chunks(self.cols).zip(product.values.chunks_mut(other.cols)) {
            for (left, right) in row.iter().zip(other.values.chunks(other.cols)) {
                sums.iter_mut().zip(right).for_each(|(sum, right)| *sum += left * right);
            }
        }
        product
    }
}

/// The numbers must be exact in the element type.
pub(super) fn to_bytes(element: &str, values: &[f32]) -> Vec<u8> {
    match element {
        "bf16" => values.iter().flat_map(|&value| float::to_bf16(value).to_le_bytes()).collect(),
        "fp16" => values.iter().flat_map(|&value| float::to_f16(value).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
    }
}

pub(super) fn from_bytes(element: &str, bytes: &[u8]) -> Vec<f32> {
    let halves = |widen: fn(u16) -> f32| bytes.chunks(2).map(|two| widen(u16::from_le_bytes([two[0], two[1]]))).collect();
    match element {
        "bf16" => halves(float::from_bf16),
        "fp16" => halves(float::from_f16),
        _ => bytes.chunks(4).map(|four| f32::from_le_bytes(four.try_into().unwrap())).collect(),
    }
}
