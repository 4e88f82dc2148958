//! The verbs out of the simplest shader of a product: a thread an output. What a kernel without tiles costs.

use bytemuck::{Pod, Zeroable};
use lowrank::{DType, Float, Result, Tensor, WebGpu};

use crate::layer::{Contender, Layer, Outputs, SCALE, Verb, widened};

/// Rows, and columns, of a workgroup in naive.wgsl.
const SIDE: u32 = 16;

/// A matrix somewhere in a buffer, as strides.
#[derive(Clone, Copy)]
struct View<'a> {
    buffer: &'a wgpu::Buffer,
    rows: usize,
    cols: usize,
    strides: [usize; 2],
}

impl View<'_> {
    fn t(self) -> Self {
        let [row, col] = self.strides;
        Self { rows: self.cols, cols: self.rows, strides: [col, row], ..self }
    }
}

fn view<E: Float>(tensor: &Tensor<WebGpu<E>>) -> View<'_> {
    let (rows, cols) = (tensor.rows(), tensor.cols());
    View { buffer: tensor.buffer().raw(), rows, cols, strides: [cols, 1] }
}

/// `struct Product` of naive.wgsl.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Uniforms {
    sizes: [u32; 3],
    add: u32,
    lhs: [u32; 2],
    rhs: [u32; 2],
    alpha: f32,
    unused: [u32; 3],
}

/// A product that is ready to be launched.
#[derive(Clone)]
struct Step {
    operands: wgpu::BindGroup,
    grid: [u32; 2],
}

pub struct Naive<E: Float> {
    verb: Verb,
    pipeline: wgpu::ComputePipeline,
    h: Tensor<WebGpu<E>>,
    y: Tensor<WebGpu<E>>,
    dh: Tensor<WebGpu<E>>,
    da: Tensor<WebGpu<E>>,
    db: Tensor<WebGpu<E>>,
    dx: Tensor<WebGpu<E>>,
    w: Tensor<WebGpu<E>>,
    /// Of one run and of the next: merging and unmerging take turns.
    steps: [Vec<Step>; 2],
}

impl<E: Float> Naive<E> {
    /// Whether bindings see the whole weight.
    pub fn fits(layer: &Layer<WebGpu<E>>) -> bool {
        let bytes = layer.shape.n * layer.shape.k * size_of::<E>();
        bytes as u64 <= layer.backend.wgpu_device().limits().max_storage_buffer_binding_size
    }

    pub fn new(layer: &Layer<WebGpu<E>>, verb: Verb) -> Result<Self> {
        let (m, k, n, r) = (layer.shape.m, layer.shape.k, layer.shape.n, layer.shape.r);
        let gpu = &layer.backend;
        let zeros = |rows, cols| Tensor::zeros(gpu, (rows, cols));
        let w = match verb {
            Verb::LoraMerge => Tensor::from_slice(gpu, (n, k), &layer.w.to_vec(gpu)?)?,
            _ => zeros(0, 0)?,
        };
        let (h, y, dh, da) = (zeros(m, r)?, zeros(m, n)?, zeros(m, r)?, zeros(r, k)?);
        let (db, dx, pipeline) = (zeros(n, r)?, zeros(m, k)?, pipeline(gpu.wgpu_device(), E::DTYPE));
        let mut naive = Self { verb, pipeline, h, y, dh, da, db, dx, w, steps: [const { Vec::new() }; 2] };
        naive.steps = [SCALE, -SCALE].map(|scale| naive.steps(layer, scale));
        Ok(naive)
    }

    fn steps(&self, Layer { backend, x, w, a, b, dy, .. }: &Layer<WebGpu<E>>, scale: f32) -> Vec<Step> {
        let [x, w, a, b, dy] = [x, w, a, b, dy].map(view);
        let [h, y, dh, da, db, dx, merged] = [&self.h, &self.y, &self.dh, &self.da, &self.db, &self.dx, &self.w].map(view);
        let step = |out, add, alpha, lhs, rhs| self.step(backend, out, add, alpha, lhs, rhs);
        if self.verb == Verb::LoraMerge {
            return vec![step(merged, true, scale, b, a)];
        }
        let mut steps = vec![step(y, false, 1.0, x, w.t())];
        if self.verb == Verb::LinearForward {
            return steps;
        }
        steps.extend([step(h, false, 1.0, x, a.t()), step(y, true, SCALE, h, b.t())]);
        if self.verb == Verb::LoraForward {
            return steps;
        }
        steps.extend([step(dh, false, SCALE, dy, b), step(da, false, 1.0, dh.t(), x), step(db, false, SCALE, dy.t(), h)]);
        steps.extend([step(dx, false, 1.0, dy, w), step(dx, true, 1.0, dh, a)]);
        steps
    }

    /// `out = alpha·lhs·rhs`, or `out += …`
    fn step(&self, gpu: &WebGpu<E>, out: View<'_>, add: bool, alpha: f32, lhs: View<'_>, rhs: View<'_>) -> Step {
        assert_eq!((out.rows, out.cols, lhs.cols), (lhs.rows, rhs.cols, rhs.rows));
        let device = gpu.wgpu_device();
        let strides = |view: View<'_>| view.strides.map(|stride| stride as u32);
        let sizes = [out.rows, out.cols, lhs.cols].map(|size| size as u32);
        let uniforms = Uniforms { sizes, add: add.into(), lhs: strides(lhs), rhs: strides(rhs), alpha, unused: [0; 3] };
        let (size, usage) = (size_of::<Uniforms>() as u64, wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST);
        let buffer = device.create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false });
        gpu.wgpu_queue().write_buffer(&buffer, 0, bytemuck::bytes_of(&uniforms));
        let bound = [(0, &buffer), (1, lhs.buffer), (2, rhs.buffer), (3, out.buffer)];
        let entries = bound.map(|(binding, buffer)| wgpu::BindGroupEntry { binding, resource: buffer.as_entire_binding() });
        let layout = &self.pipeline.get_bind_group_layout(0);
        let operands = device.create_bind_group(&wgpu::BindGroupDescriptor { label: None, layout, entries: &entries });
        Step { operands, grid: [sizes[1].div_ceil(SIDE), sizes[0].div_ceil(SIDE)] }
    }
}

fn pipeline(device: &wgpu::Device, dtype: DType) -> wgpu::ComputePipeline {
    let enable = if dtype == DType::F16 { "enable f16;\n" } else { "" };
    let text = format!("{enable}alias Elem = {dtype};\n{}", include_str!("naive.wgsl"));
    let source = wgpu::ShaderSource::Wgsl(text.into());
    let module = device.create_shader_module(wgpu::ShaderModuleDescriptor { label: Some("naive"), source });
    device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label: Some("naive"),
        layout: None,
        module: &module,
        entry_point: Some("product"),
        compilation_options: Default::default(),
        cache: None,
    })
}

impl<E: Float> Contender<WebGpu<E>> for Naive<E> {
    fn name(&self) -> &'static str {
        "naive"
    }

    fn verb(&self) -> Verb {
        self.verb
    }

    fn run(&mut self, layer: &Layer<WebGpu<E>>) {
        let (pipeline, steps) = (self.pipeline.clone(), self.steps[0].clone());
        layer.backend.record(move |encoder| {
            let mut pass = encoder.begin_compute_pass(&Default::default());
            pass.set_pipeline(&pipeline);
            for Step { operands, grid: [x, y] } in &steps {
                pass.set_bind_group(0, operands, &[]);
                pass.dispatch_workgroups(*x, *y, 1);
            }
        });
        self.steps.swap(0, 1);
    }

    fn outputs(&self, Layer { backend, .. }: &Layer<WebGpu<E>>) -> Outputs {
        let host = |tensor: &Tensor<WebGpu<E>>| widened(&tensor.to_vec(backend).expect("memory"));
        Outputs { y: host(&self.y), da: host(&self.da), db: host(&self.db), dx: host(&self.dx), w: host(&self.w) }
    }

    /// `h` or `dh`, the product and the sum.
    fn roundings(&self) -> usize {
        3
    }
}
