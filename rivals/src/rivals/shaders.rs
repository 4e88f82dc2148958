//! A naive shader, on WebGPU.

use lowrank::{Float, Result, WebGpu};

use super::naive::Naive;
use crate::layer::{Layer, Verb};
use crate::race::{Contenders, Others};

/// A shader with a thread an output, where bindings see the whole weight.
pub struct Shaders;

impl Shaders {
    pub const NAMES: [&str; 1] = ["naive"];
}

impl<E: Float> Others<WebGpu<E>> for Shaders {
    const BACKEND: &'static str = "webgpu";
    fn contenders(&self, layer: &Layer<WebGpu<E>>, verb: Verb) -> Result<Contenders<WebGpu<E>>> {
        if !Naive::fits(layer) {
            return Ok(Vec::new());
        }
        Ok(vec![Box::new(Naive::new(layer, verb)?)])
    }

    /// By the device's own clock.
    fn seconds(&self, gpu: &WebGpu<E>, work: &mut dyn FnMut()) -> f64 {
        let timed = gpu.device_time(|| {
            work();
            Ok(())
        });
        timed.expect("the adapter has timestamps").as_secs_f64()
    }
}
