//! The products of other crates, on the CPU.

use lowrank::{Cpu, Result, bf16, f16};

use super::composed::Composed;
use super::{faer, gemm, matrixmultiply, rten};
use crate::layer::{Layer, Verb};
use crate::race::{Contenders, Others};

/// The products of other crates, composed.
pub struct Products;

impl Products {
    pub const NAMES: [&str; 4] = ["gemm", "faer", "rten-gemm", "matrixmultiply"];
}

impl Others<Cpu<f32>> for Products {
    const BACKEND: &'static str = "cpu";
    fn contenders(&self, layer: &Layer<Cpu<f32>>, verb: Verb) -> Result<Contenders<Cpu<f32>>> {
        Ok(vec![
            Box::new(Composed::new(gemm::Gemm, layer, verb)?),
            Box::new(Composed::new(faer::Faer, layer, verb)?),
            Box::new(Composed::new(rten::Rten::default(), layer, verb)?),
            Box::new(Composed::new(matrixmultiply::MatrixMultiply, layer, verb)?),
        ])
    }
}

impl Others<Cpu<f16>> for Products {
    const BACKEND: &'static str = "cpu";
    fn contenders(&self, layer: &Layer<Cpu<f16>>, verb: Verb) -> Result<Contenders<Cpu<f16>>> {
        Ok(vec![Box::new(Composed::new(gemm::Gemm, layer, verb)?)])
    }
}

impl Others<Cpu<bf16>> for Products {
    const BACKEND: &'static str = "cpu";
    fn contenders(&self, _: &Layer<Cpu<bf16>>, _: Verb) -> Result<Contenders<Cpu<bf16>>> {
        Ok(Vec::new()) // no Rust crate here multiplies bf16; PyTorch does, in benches/rivals
    }
}
