//! The factors of one module.

use super::matrix::HostMatrix;
use crate::element::DType;

/// The update of one module, `ΔW = scaling·B·A`.
#[derive(Clone, Debug, PartialEq)]
pub struct Factors {
    /// `r×k`
    pub a: HostMatrix,
    /// `n×r`
    pub b: HostMatrix,
    /// The factor of `B·A`, such as `lora_alpha / r`.
    pub scaling: f32,
    /// The element type of the file.
    pub dtype: DType,
}

impl Factors {
    /// The rank.
    pub fn rank(&self) -> usize {
        self.a.rows()
    }

    /// The number of elements of both factors.
    pub fn parameters(&self) -> usize {
        self.a.values().len() + self.b.values().len()
    }
}
