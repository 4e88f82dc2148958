//! Everyone who computes the verbs: ours first, then the rivals.

mod composed;
mod faer;
mod gemm;
mod matrixmultiply;
#[cfg(feature = "webgpu")]
mod naive;
mod ours;
mod rten;
mod unfused;

use std::time::Instant;

use lowrank::{Backend, Cpu, Result, bf16, f16};

use crate::layer::{Contender, Layer, Verb};
use composed::Composed;

/// Contenders, the first of them ours.
pub type Contenders<B> = Vec<Box<dyn Contender<B>>>;

/// A backend, who else computes where it does, and by which clock.
pub trait Rivals: Backend + Clone + 'static {
    /// As the rows of JSON call it.
    const NAME: &'static str;

    /// Those besides lowrank itself.
    fn others(layer: &Layer<Self>, verb: Verb) -> Result<Contenders<Self>>;

    /// Seconds that `work` takes.
    fn seconds(&self, work: &mut dyn FnMut()) -> f64 {
        let began = Instant::now();
        work();
        began.elapsed().as_secs_f64()
    }
}

impl Rivals for Cpu<f32> {
    const NAME: &'static str = "cpu";
    fn others(layer: &Layer<Self>, verb: Verb) -> Result<Contenders<Self>> {
        Ok(vec![
            Box::new(Composed::new(gemm::Gemm, layer, verb)?),
            Box::new(Composed::new(faer::Faer, layer, verb)?),
            Box::new(Composed::new(rten::Rten::default(), layer, verb)?),
            Box::new(Composed::new(matrixmultiply::MatrixMultiply, layer, verb)?),
        ])
    }
}

impl Rivals for Cpu<f16> {
    const NAME: &'static str = "cpu";
    fn others(layer: &Layer<Self>, verb: Verb) -> Result<Contenders<Self>> {
        Ok(vec![Box::new(Composed::new(gemm::Gemm, layer, verb)?)])
    }
}

impl Rivals for Cpu<bf16> {
    const NAME: &'static str = "cpu";
    fn others(_: &Layer<Self>, _: Verb) -> Result<Contenders<Self>> {
        Ok(Vec::new()) // no Rust crate here multiplies bf16; PyTorch does, in benches/rivals
    }
}

#[cfg(feature = "webgpu")]
impl<E: lowrank::Float> Rivals for lowrank::WebGpu<E> {
    const NAME: &'static str = "webgpu";
    fn others(layer: &Layer<Self>, verb: Verb) -> Result<Contenders<Self>> {
        let naive = naive::Naive::fits(layer).then(|| naive::Naive::new(layer, verb));
        Ok(naive.transpose()?.into_iter().map(|naive| Box::new(naive) as Box<dyn Contender<Self>>).collect())
    }

    /// By the device's clock, where it has one.
    fn seconds(&self, work: &mut dyn FnMut()) -> f64 {
        let timed = self.device_time(|| {
            work();
            Ok(())
        });
        timed.expect("the adapter has timestamps").as_secs_f64()
    }
}

/// Everyone, for one verb on one layer.
pub fn contenders<B: Rivals>(layer: &Layer<B>, verb: Verb) -> Result<Contenders<B>> {
    let mut all: Contenders<B> = vec![Box::new(ours::Ours::new("lowrank", layer, verb)?)];
    all.extend(B::others(layer, verb)?);
    if matches!(verb, Verb::LoraForward | Verb::LoraForwardBackward) {
        all.push(Box::new(unfused::Unfused::new(layer, verb)?));
    }
    if verb == Verb::LoraForward {
        all.push(Box::new(ours::Ours::new("plain", layer, Verb::LinearForward)?)); // what the adapter costs
    }
    Ok(all)
}
