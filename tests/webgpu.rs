//! The one suite, on WebGPU.

mod support;

use std::sync::OnceLock;

use lowrank::WebGpu;

fn gpu() -> WebGpu<f32> {
    static GPU: OnceLock<WebGpu<f32>> = OnceLock::new();
    GPU.get_or_init(|| WebGpu::new().unwrap()).clone()
}

suite!(webgpu_f32, crate::gpu());
