//! What an adapter can do, by its own clock.

use lowrank::op::Add;
use lowrank::{Backend, Result, Tensor, WebGpu};

use super::Peaks;

/// Invocations, and steps of each, of the shader that multiplies and adds.
const INVOCATIONS: u32 = 1 << 16;
const STEPS: u32 = 1024;
/// Numbers of a buffer that is copied: 64 MiB.
const LEN: usize = 16 << 20;
const TRIES: usize = 5;

/// Chains of multiply-adds in registers: eight of four lanes an invocation.
const FMA: &str = "
@group(0) @binding(0) var<storage, read_write> out: array<vec4<f32>>;
@compute @workgroup_size(64)
fn chains(@builtin(global_invocation_id) id: vec3<u32>) {
  let f = vec4(0.999);
  var a = vec4(f32(id.x)); var b = a + 1.0; var c = a + 2.0; var d = a + 3.0;
  var e = a + 4.0; var g = a + 5.0; var h = a + 6.0; var i = a + 7.0;
  for (var step = 0u; step < STEPS; step++) {
    a = fma(a, f, f); b = fma(b, f, f); c = fma(c, f, f); d = fma(d, f, f);
    e = fma(e, f, f); g = fma(g, f, f); h = fma(h, f, f); i = fma(i, f, f);
  }
  out[id.x] = a + b + c + d + e + g + h + i;
}";

impl Peaks {
    /// Multiply-adds of a shader; reading and copying by adding one buffer to another, which reads two and writes one.
    pub fn of_device(gpu: &WebGpu<f32>) -> Result<Self> {
        let fma = f64::from(INVOCATIONS) * f64::from(STEPS) * 8.0 * 4.0 * 2.0 / least(|| chains(gpu))?;
        let (x, mut y) = (Tensor::zeros(gpu, (1, LEN))?, Tensor::zeros(gpu, (1, LEN))?);
        let copy = 3.0 * 4.0 * LEN as f64 / least(|| seconds(gpu, || Add { x: x.view(), scale: 1.0, y: y.view_mut() }.run(gpu)))?;
        Ok(Self { threads: None, fma, amx: None, read: copy, copy })
    }
}

fn least(mut timed: impl FnMut() -> Result<f64>) -> Result<f64> {
    let mut least = f64::MAX;
    for _ in 0..TRIES {
        least = least.min(timed()?);
    }
    Ok(least)
}

fn seconds(gpu: &WebGpu<f32>, work: impl FnOnce() -> Result<()>) -> Result<f64> {
    Ok(gpu.device_time(work)?.as_secs_f64())
}

fn chains(gpu: &WebGpu<f32>) -> Result<f64> {
    let device = gpu.wgpu_device();
    let out = gpu.zeros::<f32>(4 * INVOCATIONS as usize)?;
    let source = wgpu::ShaderSource::Wgsl(FMA.replace("STEPS", &format!("{STEPS}u")).into());
    let module = device.create_shader_module(wgpu::ShaderModuleDescriptor { label: Some("chains"), source });
    let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label: Some("chains"),
        layout: None,
        module: &module,
        entry_point: Some("chains"),
        compilation_options: Default::default(),
        cache: None,
    });
    let entries = [wgpu::BindGroupEntry { binding: 0, resource: out.raw().as_entire_binding() }];
    let layout = &pipeline.get_bind_group_layout(0);
    let operands = device.create_bind_group(&wgpu::BindGroupDescriptor { label: None, layout, entries: &entries });
    let launch = move |encoder: &mut wgpu::CommandEncoder| {
        let mut pass = encoder.begin_compute_pass(&Default::default());
        pass.set_pipeline(&pipeline);
        pass.set_bind_group(0, &operands, &[]);
        pass.dispatch_workgroups(INVOCATIONS / 64, 1, 1);
    };
    seconds(gpu, || {
        gpu.record(launch);
        Ok(())
    })
}
