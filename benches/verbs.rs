//! `cargo bench` measures each verb on each backend. Benchmarks are named `verb/backend/dtype/shape`, with the shapes of
//! `shapes/`.
//!
//! Throughput is in FLOP for products (which criterion calls elements), and in bytes for verbs that are bound by memory. `cargo
//! bench -- --quick` takes less time, and `cargo bench -- lora_forward/cpu2/f32` runs a part. `cargo run --release -p rivals`
//! measures other libraries. `RESULTS.md` has results. WebGPU is timed with timestamps of the device, if it has them.

mod shapes;

use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use lowrank::autograd::{Gradients, Tape};
use lowrank::nn::{Adam, Adaptable, Mlp};
use lowrank::op::{
    self, AdamRate, Labels, LinearBackward, LinearForward, LoraBackward, LoraForward, LoraMerge, Rounding, WeightGrad,
};
use lowrank::random::Rng;
use lowrank::{Backend, Cpu, Float, Tensor, bf16};

use shapes::{RANKS, Shape};

/// The tensors of a layer.
struct Layer<B: Backend> {
    x: Tensor<B>,
    w: Tensor<B>,
    a: Tensor<B>,
    b: Tensor<B>,
    dy: Tensor<B>,
    h: Tensor<B, f32>,
    y: Tensor<B>,
    da: Tensor<B, f32>,
    db: Tensor<B, f32>,
    dx: Tensor<B>,
}

impl<B: Backend> Layer<B> {
    fn new(backend: &B, Shape { m, k, n, r, .. }: Shape) -> Self {
        let mut rng = Rng::new(1);
        let mut new = |rows, cols| {
            let host: Vec<B::Elem> = (0..rows * cols).map(|_| B::Elem::from_f32(rng.unit() as f32 - 0.5)).collect();
            Tensor::from_slice(backend, (rows, cols), &host).expect("memory")
        };
        let (x, w, a, b, dy) = (new(m, k), new(n, k), new(r, k), new(n, r), new(m, n));
        let (y, dx) = (new(m, n), new(m, k));
        let zeros = |rows, cols| Tensor::zeros(backend, (rows, cols)).expect("memory");
        Self { x, w, a, b, dy, h: zeros(m, r), y, da: zeros(r, k), db: zeros(n, r), dx }
    }
}

/// Measures the time of a number of calls.
type Clock<B> = fn(&B, u64, &mut dyn FnMut()) -> Duration;

/// Measures wall-clock time, and waits for the device after each call.
fn wall<B: Backend>(backend: &B, calls: u64, call: &mut dyn FnMut()) -> Duration {
    let began = Instant::now();
    for _ in 0..calls {
        call();
        backend.synchronize().expect("synchronize");
    }
    began.elapsed()
}

/// Measures with timestamps of the device, or wall-clock time if it has none.
#[cfg(feature = "webgpu")]
fn device<E: Float>(gpu: &lowrank::WebGpu<E>, calls: u64, call: &mut dyn FnMut()) -> Duration {
    let timed = gpu.device_time(|| {
        (0..calls).for_each(|_| call());
        Ok(())
    });
    timed.unwrap_or_else(|_| wall(gpu, calls, call))
}

/// The benchmarks of one backend on one shape.
struct Bench<'c, B: Backend> {
    c: &'c mut Criterion,
    backend: &'c B,
    clock: Clock<B>,
    /// For example `cpu2/f32/prefill_512x4096x4096_r16`.
    id: String,
}

impl<B: Backend> Bench<'_, B> {
    fn run(&mut self, verb: &str, throughput: Throughput, mut call: impl FnMut(&B) -> lowrank::Result<()>) {
        let mut group = self.c.benchmark_group(verb);
        group.throughput(throughput);
        group.bench_function(&self.id, |bench| {
            bench.iter_custom(|calls| (self.clock)(self.backend, calls, &mut || call(self.backend).expect(verb)))
        });
        group.finish();
    }
}

fn flop(multiply_adds: usize) -> Throughput {
    Throughput::Elements(2 * multiply_adds as u64)
}

fn bytes(elements: usize, size: usize) -> Throughput {
    Throughput::Bytes((elements * size) as u64)
}

/// The verbs of a layer with an adapter.
fn lora<B: Backend>(bench: &mut Bench<'_, B>, Shape { m, k, n, r, .. }: Shape, layer: &mut Layer<B>) {
    let (scale, update) = (2.0, m * r * (n + k));
    let Layer { x, w, a, b, dy, h, y, da, db, dx } = layer;
    bench.run("lora_forward", flop(m * n * k + update), |backend| {
        LoraForward {
            x: x.view(),
            w: Some((&*w).into()),
            bias: None,
            a: (&*a).into(),
            b: (&*b).into(),
            scale,
            dropout: None,
            h: h.view_mut(),
            y: y.into(),
        }
        .run(backend)
    });
    bench.run("lora_backward", flop(m * n * k + 2 * update), |backend| {
        LoraBackward {
            x: x.view(),
            w: Some((&*w).into()),
            a: (&*a).into(),
            b: (&*b).into(),
            h: h.view(),
            dy: dy.view(),
            scale,
            dropout: None,
            da: da.view_mut(),
            db: db.view_mut(),
            dbias: None,
            dx: Some(dx.into()),
        }
        .run(backend)
    });
    let mut sign = 1.0; // merging and unmerging alternate
    bench.run("lora_merge", bytes(2 * n * k, size_of::<B::Elem>()), |backend| {
        sign = -sign;
        LoraMerge { a: (&*a).into(), b: (&*b).into(), scale: sign * scale, rounding: Rounding::Nearest, w: w.view_mut() }
            .run(backend)
    });
}

/// The verbs of a layer without adapter. Adam is measured only for small batches, as in training of the weight itself.
fn linear<B: Backend>(bench: &mut Bench<'_, B>, Shape { m, k, n, .. }: Shape, layer: &mut Layer<B>) {
    let Layer { x, w, dy, y, dx, .. } = layer;
    bench.run("linear_forward", flop(m * n * k), |backend| {
        LinearForward { x: x.view(), w: (&*w).into(), bias: None, y: y.into() }.run(backend)
    });
    bench.run("linear_backward", flop(m * n * k), |backend| {
        LinearBackward { x: Some(x.view()), w: Some((&*w).into()), dy: dy.view(), dx: Some(dx.into()), dw: None, dbias: None }
            .run(backend)
    });
    if m > 1 && m <= 16 {
        let zeros = || Tensor::zeros(bench.backend, (n, k)).expect("memory");
        let (mut first, mut second) = (zeros(), zeros());
        let rate = AdamRate::new(1e-3, 0.9, 0.999, 1e-8, 10).expect("rate");
        bench.run("adam", bytes(n * k, 16 + 2 * size_of::<B::Elem>()), |backend| {
            op::Adam { grad: WeightGrad::Factored { dy, x }, rate, m: &mut first, v: &mut second, master: None, w }.run(backend)
        });
    }
}

/// Measures every shape at its own rank, and the square shape at the other ranks.
fn verbs<B: Backend>(c: &mut Criterion, backend: &B, name: &str, clock: Clock<B>) {
    for shape in Shape::all() {
        let id = |shape: Shape| format!("{name}/{}/{shape}", B::Elem::DTYPE);
        let mut layer = Layer::new(backend, shape);
        let mut bench = Bench { c, backend, clock, id: id(shape) };
        lora(&mut bench, shape, &mut layer);
        linear(&mut bench, shape, &mut layer);
        if shape.m == shape.n && shape.n == shape.k {
            around(&mut bench, shape, &mut layer);
        }
        let others = RANKS.into_iter().filter(|&r| shape.name == "square" && r != shape.r);
        for shape in others.map(|r| shape.with_rank(r)) {
            bench.id = id(shape);
            lora(&mut bench, shape, &mut Layer::new(backend, shape));
        }
    }
}

/// The verbs that are not products, for the weight and the batch of one layer.
fn around<B: Backend>(bench: &mut Bench<'_, B>, Shape { m, k, n, .. }: Shape, layer: &mut Layer<B>) {
    let Layer { x: z, w, a, b, dy, y, .. } = layer;
    let zeros = |rows, cols| Tensor::<B, f32>::zeros(bench.backend, (rows, cols)).expect("memory");
    let (mut norm, mut dmagnitude, mut sum, gradient) = (zeros(1, n), zeros(1, n), zeros(n, k), zeros(n, k));
    let magnitude = Tensor::from_slice(bench.backend, (1, n), &vec![B::Elem::from_f32(1.0); n]).expect("memory");
    let (norm, magnitude, elem) = (&mut norm, &magnitude, size_of::<B::Elem>());
    bench.run("lora_row_norm", bytes(n * k, elem), |backend| {
        op::LoraRowNorm { w: (&*w).into(), a: (&*a).into(), b: (&*b).into(), scale: 1.0, norm: norm.view_mut() }.run(backend)
    });
    bench.run("magnitude", bytes(2 * m * n, elem), |backend| {
        op::Magnitude { z: z.view(), magnitude: magnitude.view(), norm: norm.view(), bias: None, y: y.view_mut() }.run(backend)
    });
    bench.run("magnitude_backward", bytes(5 * m * n, elem), |backend| {
        let (dz, dmagnitude) = (Some(&mut *y), Some(&mut dmagnitude));
        op::MagnitudeBackward {
            z: z.view(),
            magnitude: magnitude.view(),
            norm: norm.view(),
            dy: dy.view(),
            dz: dz.map(Tensor::view_mut),
            dmagnitude: dmagnitude.map(Tensor::view_mut),
            dbias: None,
        }
        .run(backend)
    });
    bench.run("accumulate", bytes(3 * n * k, 4), |backend| {
        op::Accumulate { x: gradient.view(), scale: 0.5, y: sum.view_mut() }.run(backend)
    });
    let dropout = op::Dropout::new(0.1, 1).expect("dropout");
    bench.run("dropout_forward", bytes(2 * m * n, elem), |backend| {
        op::DropoutForward { x: z.view(), dropout, y: y.view_mut() }.run(backend)
    });
    let rounding = Rounding::Stochastic { seed: 1 };
    bench.run("lora_merge_stochastic", bytes(2 * n * k, elem), |backend| {
        LoraMerge { a: (&*a).into(), b: (&*b).into(), scale: 1e-6, rounding, w: w.view_mut() }.run(backend)
    });
}

/// One pre-training step of the MNIST model, batch 10: forward, backward, Adam.
fn mnist_step<B: Backend>(c: &mut Criterion, backend: &B, name: &str) {
    let mut rng = Rng::new(1);
    let mut model = Mlp::new(backend, &[784, 1000, 2000, 10], &mut rng).expect("model");
    let mut adam = Adam::new(1e-3).expect("adam");
    let images: Vec<B::Elem> = (0..7840).map(|_| B::Elem::from_f32(rng.unit() as f32)).collect();
    let labels: Vec<u32> = (0..10).collect();
    let mut group = c.benchmark_group("mnist_step");
    group.throughput(Throughput::Bytes(2_807_010 * 32));
    let mut gradients = Gradients::default();
    group.bench_function(format!("{name}/{}/10", B::Elem::DTYPE), |bench| {
        bench.iter(|| {
            let mut tape = Tape::reusing(backend, std::mem::take(&mut gradients));
            let x = tape.input(Tensor::from_slice(backend, (10, 784), &images).expect("x"));
            let logits = model.forward(&mut tape, x, None).expect("forward");
            let labels = Labels::new(backend, 10, &labels).expect("labels");
            let loss = tape.cross_entropy(logits, &labels).expect("loss");
            gradients = tape.backward().expect("backward");
            adam.step(backend, model.params_mut(), &gradients).expect("adam");
            loss.to_vec(backend).expect("loss")
        })
    });
    group.finish();
}

fn cpu(c: &mut Criterion) {
    for threads in [1, 2] {
        let cpu = Cpu::<f32>::new().and_then(|cpu| cpu.with_threads(threads)).expect("cpu");
        all(c, &cpu, &format!("cpu{threads}"), wall);
    }
    let cpu = Cpu::<bf16>::new().and_then(|cpu| cpu.with_threads(2)).expect("cpu");
    all(c, &cpu, "cpu2", wall);
}

fn gpu(c: &mut Criterion) {
    #[cfg(feature = "webgpu")]
    {
        measure_if_available(c, lowrank::WebGpu::<f32>::new(), "webgpu", device);
        measure_if_available(c, lowrank::WebGpu::<lowrank::f16>::new(), "webgpu", device);
    }
    #[cfg(feature = "cuda")]
    {
        measure_if_available(c, lowrank::Cuda::<f32>::new(0), "cuda", wall);
        measure_if_available(c, lowrank::Cuda::<bf16>::new(0), "cuda", wall);
    }
    let _ = c; // unused without a GPU feature
}

/// Measures a device, or prints that it is missing.
#[cfg(any(feature = "webgpu", feature = "cuda"))]
fn measure_if_available<B: Backend>(c: &mut Criterion, backend: lowrank::Result<B>, name: &str, clock: Clock<B>) {
    match backend {
        Ok(backend) => all(c, &backend, name, clock),
        Err(error) => eprintln!("not measured: {name}/{}: {error}", B::Elem::DTYPE),
    }
}

fn all<B: Backend>(c: &mut Criterion, backend: &B, name: &str, clock: Clock<B>) {
    mnist_step(c, backend, name);
    verbs(c, backend, name, clock);
}

criterion_group!(benches, cpu, gpu);
criterion_main!(benches);
