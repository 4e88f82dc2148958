//! `cargo bench`: each verb on each backend, named `verb/backend/dtype/shape`.
//!
//! Throughput is in elements: one is a multiply-add for products, and a parameter for updates. `benches/RESULTS.md` keeps what
//! was measured.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use lowrank::autograd::Tape;
use lowrank::nn::{Adam, Mlp};
use lowrank::op::{self, AdamRate, Labels, LinearForward, LoraBackward, LoraForward, LoraMerge, Rounding, WeightGrad};
use lowrank::random::Rng;
use lowrank::{Backend, Cpu, Float, Tensor, bf16};

/// Rows, inputs, outputs, rank.
struct Shape {
    name: &'static str,
    m: usize,
    k: usize,
    n: usize,
    r: usize,
}

const SHAPES: [Shape; 6] = [
    Shape { name: "mnist1_10x784x1000_r1", m: 10, k: 784, n: 1000, r: 1 },
    Shape { name: "mnist2_10x1000x2000_r1", m: 10, k: 1000, n: 2000, r: 1 },
    Shape { name: "decode_1x4096x4096_r16", m: 1, k: 4096, n: 4096, r: 16 },
    Shape { name: "square_1024_r16", m: 1024, k: 1024, n: 1024, r: 16 },
    Shape { name: "prefill_512x4096x4096_r16", m: 512, k: 4096, n: 4096, r: 16 },
    Shape { name: "mlp_512x4096x11008_r16", m: 512, k: 4096, n: 11008, r: 16 },
];

/// Tensors of a layer.
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
    fn new(backend: &B, &Shape { m, k, n, r, .. }: &Shape) -> Self {
        let mut rng = Rng::new(1);
        let mut new = |rows, cols| {
            let host: Vec<B::Elem> = (0..rows * cols).map(|_| B::Elem::from_f32(rng.unit() as f32 - 0.5)).collect();
            Tensor::from_slice(backend, (rows, cols), &host).expect("memory")
        };
        let (x, w, a, b, dy) = (new(m, k), new(n, k), new(r, k), new(n, r), new(m, n));
        let (y, dx) = (new(m, n), new(m, k));
        let wide = |rows, cols| Tensor::zeros(backend, (rows, cols)).expect("memory");
        Self { x, w, a, b, dy, h: wide(m, r), y, da: wide(r, k), db: wide(n, r), dx }
    }
}

fn verbs<B: Backend>(c: &mut Criterion, backend: &B, name: &str) {
    for shape in &SHAPES {
        let Shape { m, k, n, r, .. } = *shape;
        let id = format!("{name}/{}/{}", B::Elem::DTYPE, shape.name);
        let mut layer = Layer::new(backend, shape);
        let wait = || backend.synchronize().expect("synchronize");

        let mut group = c.benchmark_group("linear_forward");
        group.throughput(Throughput::Elements((m * n * k) as u64));
        let Layer { x, w, a, b, dy, h, y, da, db, dx } = &mut layer;
        group.bench_function(&id, |bench| {
            bench.iter(|| {
                LinearForward { x, w, bias: None, y }.run(backend).expect("linear_forward");
                wait();
            })
        });
        group.finish();

        let mut group = c.benchmark_group("lora_forward");
        group.throughput(Throughput::Elements((m * (n * k + r * (n + k))) as u64));
        group.bench_function(&id, |bench| {
            bench.iter(|| {
                let op = LoraForward { x, w: Some(w), bias: None, a, b, scale: 1.0, dropout: None, h, y };
                op.run(backend).expect("lora_forward");
                wait();
            })
        });
        group.finish();

        let mut group = c.benchmark_group("lora_backward");
        group.throughput(Throughput::Elements((m * (n * k + 2 * r * (n + k))) as u64));
        group.bench_function(&id, |bench| {
            bench.iter(|| {
                let (da, db, dx) = (&mut *da, &mut *db, Some(&mut *dx));
                let op = LoraBackward { x, w: Some(w), a, b, h, dy, scale: 1.0, dropout: None, da, db, dbias: None, dx };
                op.run(backend).expect("lora_backward");
                wait();
            })
        });
        group.finish();

        let mut group = c.benchmark_group("lora_merge");
        group.throughput(Throughput::Bytes((2 * n * k * size_of::<B::Elem>()) as u64));
        group.bench_function(&id, |bench| {
            bench.iter(|| {
                LoraMerge { a, b, scale: 1e-6, rounding: Rounding::Nearest, w }.run(backend).expect("lora_merge");
                wait();
            })
        });
        group.finish();

        if m <= 16 {
            let (mut first, mut second) =
                (Tensor::zeros(backend, (n, k)).expect("m"), Tensor::zeros(backend, (n, k)).expect("v"));
            let rate = AdamRate::new(1e-3, 0.9, 0.999, 1e-8, 10).expect("rate");
            let mut group = c.benchmark_group("adam");
            group.throughput(Throughput::Bytes((n * k * (16 + 2 * size_of::<B::Elem>())) as u64));
            group.bench_function(&id, |bench| {
                bench.iter(|| {
                    let grad = WeightGrad::Factored { dy, x };
                    op::Adam { grad, rate, m: &mut first, v: &mut second, w }.run(backend).expect("adam");
                    wait();
                })
            });
            group.finish();
        }
    }
}

/// The verbs beside the products, at the weight and the batch of one layer: 512 rows, 4096 inputs and outputs, rank 16.
fn around<B: Backend>(c: &mut Criterion, backend: &B, name: &str) {
    let shape = Shape { name: "512x4096x4096_r16", m: 512, k: 4096, n: 4096, r: 16 };
    let Layer { x: z, mut w, a, b, dy, mut y, .. } = Layer::new(backend, &shape);
    let Shape { m, k, n, .. } = shape;
    let wide = |rows, cols| Tensor::<B, f32>::zeros(backend, (rows, cols)).expect("memory");
    let (mut norm, mut dmagnitude, mut sum) = (wide(1, n), wide(1, n), wide(n, k));
    let (gradient, elem) = (wide(n, k), size_of::<B::Elem>());
    let magnitude = Tensor::from_slice(backend, (1, n), &vec![B::Elem::from_f32(1.0); n]).expect("memory");
    let mut bench = |verb: &str, bytes: usize, run: &mut dyn FnMut() -> lowrank::Result<()>| {
        let mut group = c.benchmark_group(verb);
        group.throughput(Throughput::Bytes(bytes as u64));
        group.bench_function(format!("{name}/{}/{}", B::Elem::DTYPE, shape.name), |bench| {
            bench.iter(|| run().and_then(|()| backend.synchronize()).expect(verb))
        });
        group.finish();
    };
    bench("lora_row_norm", n * k * elem, &mut || {
        op::LoraRowNorm { w: &w, a: &a, b: &b, scale: 1.0, norm: &mut norm }.run(backend)
    });
    bench("magnitude", 2 * m * n * elem, &mut || {
        op::Magnitude { z: &z, magnitude: &magnitude, norm: &norm, bias: None, y: &mut y }.run(backend)
    });
    bench("magnitude_backward", 5 * m * n * elem, &mut || {
        let (dz, dmagnitude) = (Some(&mut y), Some(&mut dmagnitude));
        op::MagnitudeBackward { z: &z, magnitude: &magnitude, norm: &norm, dy: &dy, dz, dmagnitude, dbias: None }.run(backend)
    });
    bench("accumulate", 12 * n * k, &mut || op::Accumulate { x: &gradient, scale: 0.5, y: &mut sum }.run(backend));
    let dropout = op::Dropout::new(0.1, 1).expect("dropout");
    bench("dropout_forward", 2 * m * n * elem, &mut || op::DropoutForward { x: &z, dropout, y: &mut y }.run(backend));
    bench("lora_merge_by_chance", 2 * n * k * elem, &mut || {
        let rounding = Rounding::Stochastic { seed: 1 };
        LoraMerge { a: &a, b: &b, scale: 1e-6, rounding, w: &mut w }.run(backend)
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
    group.bench_function(format!("{name}/{}/10", B::Elem::DTYPE), |bench| {
        bench.iter(|| {
            let mut tape = Tape::new(backend);
            let x = tape.input(Tensor::from_slice(backend, (10, 784), &images).expect("x"));
            let logits = model.forward(&mut tape, x, None).expect("forward");
            let labels = Labels::new(backend, 10, &labels).expect("labels");
            let loss = tape.cross_entropy(logits, &labels).expect("loss");
            let gradients = tape.backward().expect("backward");
            adam.step(backend, model.params_mut(), &gradients).expect("adam");
            loss.to_vec(backend).expect("loss")
        })
    });
    group.finish();
}

fn cpu(c: &mut Criterion) {
    for threads in [1, 2] {
        let cpu = Cpu::<f32>::new().and_then(|cpu| cpu.with_threads(threads)).expect("cpu");
        all(c, &cpu, &format!("cpu{threads}"));
    }
    let cpu = Cpu::<bf16>::new().and_then(|cpu| cpu.with_threads(2)).expect("cpu");
    all(c, &cpu, "cpu2");
}

fn gpu(c: &mut Criterion) {
    #[cfg(feature = "webgpu")]
    {
        if_there(c, lowrank::WebGpu::<f32>::new(), "webgpu");
        if_there(c, lowrank::WebGpu::<lowrank::f16>::new(), "webgpu");
    }
    #[cfg(feature = "cuda")]
    {
        if_there(c, lowrank::Cuda::<f32>::new(0), "cuda");
        if_there(c, lowrank::Cuda::<bf16>::new(0), "cuda");
    }
    let _ = c; // without a GPU feature
}

/// A device that is missing is named, not measured.
#[cfg(any(feature = "webgpu", feature = "cuda"))]
fn if_there<B: Backend>(c: &mut Criterion, backend: lowrank::Result<B>, name: &str) {
    match backend {
        Ok(backend) => all(c, &backend, name),
        Err(error) => eprintln!("not measured: {name}/{}: {error}", B::Elem::DTYPE),
    }
}

fn all<B: Backend>(c: &mut Criterion, backend: &B, name: &str) {
    mnist_step(c, backend, name);
    around(c, backend, name);
    verbs(c, backend, name);
}

criterion_group!(benches, cpu, gpu);
criterion_main!(benches);
