//! Everyone who computes the verbs: ours first, then the rivals.

mod composed;
mod faer;
mod gemm;
mod matrixmultiply;
mod ours;
mod rten;
mod unfused;

use lowrank::{Float, Result, bf16, f16};

use crate::layer::{Contender, Layer, Verb};
use composed::Composed;

/// Contenders, the first of them ours.
pub type Contenders<E> = Vec<Box<dyn Contender<E>>>;

/// An element type, and who else computes with it.
pub trait Rivals: Float {
    /// Those besides lowrank itself.
    fn others(layer: &Layer<Self>, verb: Verb) -> Result<Contenders<Self>>;
}

impl Rivals for f32 {
    fn others(layer: &Layer<f32>, verb: Verb) -> Result<Contenders<f32>> {
        Ok(vec![
            Box::new(Composed::new(gemm::Gemm, layer, verb)?),
            Box::new(Composed::new(faer::Faer, layer, verb)?),
            Box::new(Composed::new(rten::Rten::default(), layer, verb)?),
            Box::new(Composed::new(matrixmultiply::MatrixMultiply, layer, verb)?),
        ])
    }
}

impl Rivals for f16 {
    fn others(layer: &Layer<f16>, verb: Verb) -> Result<Contenders<f16>> {
        Ok(vec![Box::new(Composed::new(gemm::Gemm, layer, verb)?)])
    }
}

impl Rivals for bf16 {
    fn others(_: &Layer<bf16>, _: Verb) -> Result<Contenders<bf16>> {
        Ok(Vec::new()) // no Rust crate here multiplies bf16; PyTorch does, in benches/rivals
    }
}

/// Everyone, for one verb on one layer.
pub fn contenders<E: Rivals>(layer: &Layer<E>, verb: Verb) -> Result<Contenders<E>> {
    let mut all: Contenders<E> = vec![Box::new(ours::Ours::new("lowrank", layer, verb)?)];
    all.extend(E::others(layer, verb)?);
    if matches!(verb, Verb::LoraForward | Verb::LoraForwardBackward) {
        all.push(Box::new(unfused::Unfused::new(layer, verb)?));
    }
    if verb == Verb::LoraForward {
        all.push(Box::new(ours::Ours::new("plain", layer, Verb::LinearForward)?)); // what the adapter costs
    }
    Ok(all)
}
