//! The verbs out of burn's products and additions, on tensors of burn's own.

use burn_backend::ops::FloatTensorOps;
use burn_backend::{Backend as _, BackendTypes, Scalar, TensorData};
use burn_wgpu::{Wgpu, WgpuDevice};
use lowrank::{Backend, Result, Tensor, WebGpu};
use rivals::layer::{Contender, Layer, Outputs, SCALE, Verb};
use rivals::race::{Contenders, Others};

type Device = <Wgpu as BackendTypes>::Device;
type Matrix = <Wgpu as BackendTypes>::FloatTensorPrimitive;

/// burn, on the device that lowrank computes on.
pub struct Burn {
    device: Device,
}

impl Burn {
    pub const NAMES: [&str; 1] = ["burn"];

    pub fn new(device: WgpuDevice) -> Self {
        Self { device: device.into() }
    }
}

impl Others<WebGpu<f32>> for Burn {
    const BACKEND: &'static str = "webgpu";

    fn contenders(&self, layer: &Layer<WebGpu<f32>>, verb: Verb) -> Result<Contenders<WebGpu<f32>>> {
        Ok(vec![Box::new(Composed::new(&self.device, layer, verb)?)])
    }

    /// By the clock on the wall: burn hands its launches to the queue by itself.
    fn seconds(&self, gpu: &WebGpu<f32>, work: &mut dyn FnMut()) -> f64 {
        let began = std::time::Instant::now();
        work();
        gpu.synchronize().expect("the device is there");
        Wgpu::sync(&self.device).expect("the device is there");
        began.elapsed().as_secs_f64()
    }
}

struct Composed {
    verb: Verb,
    x: Matrix,
    w: Matrix,
    a: Matrix,
    b: Matrix,
    dy: Matrix,
    /// Of the last run.
    results: Results,
    /// Merging and unmerging take turns, so that the weights stay as large as they are.
    scale: f32,
}

#[derive(Default)]
struct Results {
    y: Option<Matrix>,
    da: Option<Matrix>,
    db: Option<Matrix>,
    dx: Option<Matrix>,
}

impl Composed {
    fn new(device: &Device, layer: &Layer<WebGpu<f32>>, verb: Verb) -> Result<Self> {
        let copy = |tensor: &Tensor<WebGpu<f32>>| -> Result<Matrix> {
            let host = TensorData::new(tensor.to_vec(&layer.backend)?, [tensor.rows(), tensor.cols()]);
            Ok(Wgpu::float_from_data(host, device))
        };
        let (x, w, a, b, dy) = (copy(&layer.x)?, copy(&layer.w)?, copy(&layer.a)?, copy(&layer.b)?, copy(&layer.dy)?);
        Ok(Self { verb, x, w, a, b, dy, results: Results::default(), scale: SCALE })
    }

    /// `h` and `y`
    fn forward(&self) -> (Matrix, Matrix) {
        let h = times(&self.x, &t(&self.a));
        let update = scaled(times(&h, &t(&self.b)), SCALE);
        (h, plus(times(&self.x, &t(&self.w)), update))
    }

    fn backward(&mut self, h: &Matrix) {
        let Self { x, w, a, b, dy, results, .. } = self;
        let dh = scaled(times(dy, b), SCALE);
        results.da = Some(times(&t(&dh), x));
        results.db = Some(scaled(times(&t(dy), h), SCALE));
        results.dx = Some(plus(times(dy, w), times(&dh, a)));
    }

    fn merge(&mut self) {
        let update = scaled(times(&self.b, &self.a), self.scale);
        let w = std::mem::replace(&mut self.w, update.clone()); // nobody else's, so that burn may add in place
        self.w = plus(w, update);
        self.scale = -self.scale;
    }
}

fn t(matrix: &Matrix) -> Matrix {
    Wgpu::float_swap_dims(matrix.clone(), 0, 1) // strides, not a copy
}

fn times(lhs: &Matrix, rhs: &Matrix) -> Matrix {
    Wgpu::float_matmul(lhs.clone(), rhs.clone())
}

fn plus(lhs: Matrix, rhs: Matrix) -> Matrix {
    Wgpu::float_add(lhs, rhs)
}

fn scaled(matrix: Matrix, scale: f32) -> Matrix {
    Wgpu::float_mul_scalar(matrix, Scalar::Float(scale.into()))
}

impl Contender<WebGpu<f32>> for Composed {
    fn name(&self) -> &'static str {
        Burn::NAMES[0]
    }

    fn verb(&self) -> Verb {
        self.verb
    }

    fn run(&mut self, _: &Layer<WebGpu<f32>>) {
        match self.verb {
            Verb::LinearForward => self.results.y = Some(times(&self.x, &t(&self.w))),
            Verb::LoraForward => self.results.y = Some(self.forward().1),
            Verb::LoraForwardBackward => {
                let (h, y) = self.forward();
                self.results.y = Some(y);
                self.backward(&h);
            }
            Verb::LoraMerge => self.merge(),
        }
    }

    fn outputs(&self, _: &Layer<WebGpu<f32>>) -> Outputs {
        let Results { y, da, db, dx } = &self.results;
        let merged = (self.verb == Verb::LoraMerge).then_some(&self.w);
        Outputs { y: host(y.as_ref()), da: host(da.as_ref()), db: host(db.as_ref()), dx: host(dx.as_ref()), w: host(merged) }
    }

    /// `h` or `dh`, the product, scaling and the sum.
    fn roundings(&self) -> usize {
        4
    }
}

fn host(matrix: Option<&Matrix>) -> Vec<f32> {
    let Some(matrix) = matrix else { return Vec::new() };
    let data = pollster::block_on(Wgpu::float_into_data(matrix.clone())).expect("the device is there");
    data.as_slice().expect("numbers of f32").to_vec()
}
