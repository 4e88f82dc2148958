//! The suite on WebGPU, also with reduced limits and features, and tests of what is special to this backend.
//!
//! Without an adapter the tests print that they did not run, and pass, unless `LOWRANK_REQUIRE` contains `webgpu`.

mod support;

use std::io::Write as _;
use std::sync::OnceLock;

use lowrank::autograd::Tape;
use lowrank::backend::webgpu::Limits;
use lowrank::nn::{Adam, Adaptable, Mlp};
use lowrank::op::{Add, Dropout, Labels, LinearForward, LoraForward, LoraMerge, Rounding};
use lowrank::random::Rng;
use lowrank::{Backend, Cpu, Error, Float, Result, Tensor, WebGpu, bf16, f16};
use support::bounds::assert_exact;
use support::data::{Dims, down, unwritten, up, whole};
use support::suite as check;

/// One device for all tests: opening it takes longer than most of them.
fn adapter<E: Float>(required: &str, open: impl Fn() -> Result<WebGpu<E>>) -> Option<WebGpu<E>> {
    match open() {
        Ok(gpu) => Some(gpu),
        Err(error @ Error::Unavailable { .. }) => {
            assert!(!support::is_required(required), "{error}, and LOWRANK_REQUIRE asks for {required}");
            let thread = std::thread::current();
            // Not `eprintln!`, which is shown only when a test fails.
            let _ = writeln!(std::io::stderr(), "not run: {}: {error}", thread.name().unwrap_or("a test"));
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// The message for later callers, because errors cannot be cloned.
fn reason(error: Error) -> String {
    match error {
        Error::Unavailable { reason, .. } => reason,
        error => panic!("{error}"),
    }
}

fn shared_f32() -> Option<WebGpu<f32>> {
    static GPU: OnceLock<Result<WebGpu<f32>, String>> = OnceLock::new();
    adapter("webgpu", || {
        let gpu = GPU.get_or_init(|| WebGpu::new().map_err(reason));
        gpu.clone().map_err(|reason| Error::Unavailable { backend: "webgpu", reason })
    })
}

fn shared_f16() -> Option<WebGpu<f16>> {
    static GPU: OnceLock<Result<WebGpu<f16>, String>> = OnceLock::new();
    let wide = shared_f32()?;
    adapter("webgpu-f16", || {
        let open = || WebGpu::from_device(wide.wgpu_device().clone(), wide.wgpu_queue().clone());
        let gpu = GPU.get_or_init(|| open().map_err(reason));
        gpu.clone().map_err(|reason| Error::Unavailable { backend: "webgpu", reason })
    })
}

/// The device; without one the calling test ends here.
macro_rules! or_return {
    ($gpu:expr) => {
        match $gpu {
            Some(gpu) => gpu,
            None => return,
        }
    };
}

#[path = "webgpu/lent.rs"]
mod lent;
#[path = "webgpu/views.rs"]
mod views;

suite!(webgpu_f32, or_return!(crate::shared_f32()));
suite!(webgpu_f16, or_return!(crate::shared_f16()));

/// The minimum limits that WebGPU guarantees.
const POOR: Limits =
    Limits { invocations: 256, workgroup_bytes: 16384, groups: 65535, binding_bytes: 128 << 20, subgroup: 0, matrix: 0 };
/// A layer in which every matrix spans several bindings.
const PAGES: Dims = Dims { m: 18, k: 100, n: 52, r: 12 };

/// With bindings of 2 KiB every matrix is cut, along its rows, its columns or the depth.
#[test]
fn matrices_larger_than_a_binding_are_exact() {
    let gpu = or_return!(shared_f32()).with_limits(Limits { binding_bytes: 2048, ..POOR });
    check::lora_is_exact_at(&gpu, PAGES, 1);
    check::add_is_exact(&gpu);
    check::accumulate_is_exact_on_whole_numbers(&gpu);
    check::row_norms_of_an_undone_weight_are_zero(&gpu);
    check::magnitude_is_exact_on_whole_numbers(&gpu);
    check::dropout_drops_what_the_mask_says(&gpu);
    check::cross_entropy_rounds_within_bounds(&gpu);
    check::factored_gradients_equal_dense_ones(&gpu);
}

/// If the depth is cut, partial sums of a 16-bit output must not be rounded.
#[test]
fn half_matrices_larger_than_a_binding_are_rounded_once() {
    let gpu = or_return!(shared_f16()).with_limits(Limits { binding_bytes: 1024, ..POOR });
    check::lora_is_exact_at(&gpu, PAGES, 2);
    check::magnitude_is_exact_on_whole_numbers(&gpu);
    check::stochastic_merging_takes_the_neighbour_that_the_word_says(&gpu);
}

/// Adapters without subgroups, or of another subgroup size, give exact results too.
#[test]
fn few_rows_need_no_subgroups() {
    let gpu = or_return!(shared_f32()).with_limits(Limits { binding_bytes: 1 << 30, workgroup_bytes: 32768, ..POOR });
    for (seed, (m, n)) in [(1, 70), (3, 9), (8, 100), (16, 33), (70, 12)].into_iter().enumerate() {
        check::lora_is_exact_at(&gpu, Dims { m, k: 67, n, r: 5 }, seed as u64);
    }
}

#[test]
fn small_workgroups_give_the_same_numbers() {
    for (invocations, workgroup_bytes) in [(64, 8192), (16, 4096)] {
        let gpu = or_return!(shared_f32()).with_limits(Limits { invocations, workgroup_bytes, ..POOR });
        check::lora_is_exact_at(&gpu, PAGES, 3);
        check::row_norms_of_an_undone_weight_are_zero(&gpu);
        check::magnitude_is_exact_on_whole_numbers(&gpu);
        check::cross_entropy_rounds_within_bounds(&gpu);
    }
}

/// Grids have at most 65535 groups in each dimension; here at most 2.
#[test]
fn small_grids_give_the_same_numbers() {
    let gpu = or_return!(shared_f32()).with_limits(Limits { groups: 2, ..POOR });
    check::lora_is_exact_at(&gpu, Dims { m: 150, k: 30, n: 300, r: 2 }, 4);
    check::relu_and_its_derivative_are_exact(&gpu);
    check::magnitude_is_exact_on_whole_numbers(&gpu);
    check::cross_entropy_rounds_within_bounds(&gpu);
}

/// Outputs of at least 512×512 use tiles of 128×128.
#[test]
fn the_wide_tile_is_exact_up_to_its_edges() {
    for dims in [Dims { m: 513, k: 20, n: 516, r: 3 }, Dims { m: 512, k: 33, n: 639, r: 8 }] {
        let gpu = or_return!(shared_f32());
        let layer = whole(dims, 1);
        let [x, w, a, b] = [&layer.x, &layer.w, &layer.a, &layer.b].map(|mat| up::<_, f32>(&gpu, mat));
        let (mut h, mut y) = (unwritten(&gpu, dims.m, dims.r), unwritten(&gpu, dims.m, dims.n));
        let (bias, scale) = (layer.bias.as_ref().map(|mat| up(&gpu, mat)), layer.scale as f32);
        let (h_, y_, bias) = (&mut h, &mut y, bias.as_ref());
        LoraForward {
            x: x.view(),
            w: Some((&w).into()),
            bias: bias.map(Tensor::view),
            a: (&a).into(),
            b: (&b).into(),
            scale,
            dropout: None,
            h: h_.view_mut(),
            y: y_.into(),
        }
        .run(&gpu)
        .unwrap();
        assert_exact(&format!("{dims:?} y"), &down(&gpu, &y), &layer.forward().1);
    }
}

/// Products of f16 with cooperative matrices, at a tile of 64×64 and just above it, overwriting and accumulating.
#[test]
fn cooperative_matrices_are_exact_up_to_the_edges_of_the_tile() {
    let gpu = or_return!(adapter("webgpu-matrices", WebGpu::<f16>::with_cooperative_matrices));
    assert!(gpu.limits().matrix > 0);
    for (seed, dims) in [(64, 16, 64, 3), (65, 33, 130, 17), (127, 100, 64, 20)].into_iter().enumerate() {
        let (m, k, n, r) = dims;
        check::lora_is_exact_at(&gpu, Dims { m, k, n, r }, seed as u64);
    }
    check::linear_is_exact_on_whole_numbers(&gpu);
    check::lora_rounds_within_bounds(&gpu);
}

/// Timestamps of the device, and the caller's commands between verbs.
#[test]
fn timestamps_and_the_callers_commands_work() {
    let gpu = or_return!(shared_f32());
    let (x, mut y) = (Tensor::from_slice(&gpu, (1, 4), &[1.0f32; 4]).unwrap(), Tensor::zeros(&gpu, (1, 4)).unwrap());
    let cleared = y.buffer().raw().clone();
    let work = || {
        Add { x: x.view(), y: y.view_mut() }.run(&gpu)?;
        gpu.record(move |encoder| encoder.clear_buffer(&cleared, 0, None));
        Add { x: x.view(), y: y.view_mut() }.run(&gpu)
    };
    match gpu.device_time(work) {
        Ok(time) => assert!(!time.is_zero()),
        Err(Error::Unavailable { .. }) => return, // no timestamps between launches
        Err(error) => panic!("{error}"),
    }
    assert_eq!(down(&gpu, &y), [1.0; 4]);
    let failed = gpu.device_time(|| Err(Error::Device { backend: "webgpu", reason: "the caller's".into() }));
    assert!(failed.is_err_and(|error| error.to_string().contains("the caller's")));
}

/// 172 MiB of weights; a binding of most software adapters is limited to 128 MiB.
#[test]
fn a_weight_larger_than_a_binding_works() {
    let gpu = or_return!(shared_f32());
    let (n, k) = (4096, 11008);
    let w: Vec<f32> = (0..n * k).map(|e| (e % 7) as f32 - 3.0).collect();
    let x: Vec<f32> = (0..k).map(|e| (e % 5) as f32 - 2.0).collect();
    let want: Vec<f32> = w.chunks(k).map(|row| row.iter().zip(&x).map(|(w, x)| w * x).sum()).collect();
    let (x, w) = (Tensor::from_slice(&gpu, (1, k), &x).unwrap(), Tensor::from_slice(&gpu, (n, k), &w).unwrap());
    let mut y = unwritten(&gpu, 1, n);
    LinearForward { x: x.view(), w: (&w).into(), bias: None, y: (&mut y).into() }.run(&gpu).unwrap();
    assert_eq!(down(&gpu, &y), want);
}

/// With A the identity, h is the dropped-out x.
#[test]
fn the_mask_is_that_of_the_cpu_bit_for_bit() {
    fn seen<B: Backend<Elem = f32>>(backend: &B, dropout: Dropout) -> Vec<f32> {
        let (m, k) = (37, 13);
        let identity: Vec<f32> = (0..k * k).map(|e| if e / k == e % k { 1.0 } else { 0.0 }).collect();
        let x = Tensor::from_slice(backend, (m, k), &vec![1.0; m * k]).unwrap();
        let a = Tensor::from_slice(backend, (k, k), &identity).unwrap();
        let (w, b) = (Tensor::zeros(backend, (0, k)).unwrap(), Tensor::zeros(backend, (0, k)).unwrap());
        let (mut h, mut y) = (unwritten(backend, m, k), unwritten(backend, m, 0));
        let (dropout, h_) = (Some(dropout), &mut h);
        LoraForward {
            x: x.view(),
            w: Some((&w).into()),
            bias: None,
            a: (&a).into(),
            b: (&b).into(),
            scale: 1.0,
            dropout,
            h: h_.view_mut(),
            y: (&mut y).into(),
        }
        .run(backend)
        .unwrap();
        down(backend, &h)
    }
    let (gpu, cpu) = (or_return!(shared_f32()), Cpu::new().unwrap());
    for (p, seed) in [(0.0, 1), (0.1, 2), (0.5, 0xffff_ffff_ffff), (0.9, u64::MAX)] {
        let dropout = Dropout::new(p, seed).unwrap();
        assert_eq!(seen(&gpu, dropout), seen(&cpu, dropout), "{dropout:?}");
    }
}

/// Uploads are recorded like launches, and only reading the loss submits.
#[test]
fn a_training_step_is_one_submission() {
    or_return!(shared_f32());
    let gpu = WebGpu::<f32>::new().unwrap(); // nobody else submits there
    let mut rng = Rng::new(1);
    let mut model = Mlp::new(&gpu, &[20, 30, 10], &mut rng).unwrap();
    let mut adam = Adam::new(1e-3).unwrap();
    let mut step = |images: &[f32]| {
        let mut tape = Tape::new(&gpu);
        let x = tape.input(Tensor::from_slice(&gpu, (4, 20), images).unwrap());
        let logits = model.forward(&mut tape, x, None).unwrap();
        let labels = Labels::new(&gpu, 10, &[1, 2, 3, 4]).unwrap();
        let loss = tape.cross_entropy(logits, &labels).unwrap();
        let gradients = tape.backward().unwrap();
        adam.step(&gpu, model.params_mut(), &gradients).unwrap();
        loss.to_vec(&gpu).unwrap()[0]
    };
    let first = step(&[0.5; 80]);
    for _ in 0..3 {
        let before = gpu.submissions();
        assert!(step(&[0.5; 80]) < first, "it does not learn");
        assert_eq!(gpu.submissions(), before + 1);
    }
}

/// Uploads of any size, repeated or with reads between them, are executed in the order of the calls.
#[test]
fn uploads_keep_their_order() {
    let gpu = or_return!(shared_f32());
    for len in [3, 70_000, 200_000, 300_000, 17_000_001] {
        let (ones, twos) = (vec![1.0f32; len], vec![2.0; len]);
        let (mut x, mut y) = (Tensor::from_slice(&gpu, (1, len), &ones).unwrap(), Tensor::zeros(&gpu, (1, len)).unwrap());
        Add { x: x.view(), y: y.view_mut() }.run(&gpu).unwrap();
        x.copy_from_slice(&gpu, &twos).unwrap();
        Add { x: x.view(), y: y.view_mut() }.run(&gpu).unwrap();
        x.copy_from_slice(&gpu, &ones).unwrap();
        assert_eq!(down(&gpu, &y), vec![3.0; len], "{len}");
        assert_eq!(down(&gpu, &x), ones, "{len}");
    }
}

#[test]
fn another_device_on_the_same_adapter_gives_the_same_bits() {
    fn merged(gpu: &WebGpu<f32>) -> Vec<f32> {
        let layer = support::data::random::<f32>(Dims { m: 1, k: 90, n: 70, r: 5 }, 0.3, 2);
        let (a, b, mut w) = (up(gpu, &layer.a), up(gpu, &layer.b), up(gpu, &layer.w));
        LoraMerge { a: (&a).into(), b: (&b).into(), scale: 0.3, rounding: Rounding::Nearest, w: w.view_mut() }.run(gpu).unwrap();
        down(gpu, &w)
    }
    let gpu = or_return!(shared_f32());
    assert_eq!(merged(&gpu), merged(&WebGpu::new().unwrap()));
}

/// A pipeline cache is written on request and when the device is dropped; a damaged one is replaced, and results do not change.
#[test]
fn pipelines_are_cached_in_a_file() {
    or_return!(shared_f32());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pipelines");
    let open = || adapter("webgpu-pipelines", || WebGpu::<f32>::with_pipelines(&path));
    let written = || std::fs::read(&path).unwrap();
    let gpu = or_return!(open());
    gpu.save_pipelines().unwrap();
    assert!(!path.exists(), "nothing was compiled");
    check::add_is_exact(&gpu);
    gpu.save_pipelines().unwrap();
    let first = written();
    drop(gpu);
    assert_eq!(written(), first, "nothing was compiled since");
    for damaged in [&first[..first.len() - 1], b"", b"something else"] {
        std::fs::write(&path, damaged).unwrap();
        let gpu = open().unwrap();
        check::add_is_exact(&gpu);
        assert_eq!(written(), damaged);
        drop(gpu);
        assert_eq!(written()[..8], first[..8]);
    }
    let error = WebGpu::<f32>::with_pipelines(folder.path()).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
}

/// In a process of its own, because environment variables are shared by all tests.
#[test]
fn shaders_can_be_read() {
    or_return!(shared_f32());
    let folder = tempfile::tempdir().unwrap();
    let mut run = std::process::Command::new(std::env::current_exe().unwrap());
    let run = run.args(["--exact", "webgpu_f32::add_is_exact"]).env("LOWRANK_DUMP_SHADERS", folder.path().join("shaders"));
    assert!(run.stdout(std::process::Stdio::null()).status().unwrap().success());
    let text = std::fs::read_to_string(folder.path().join("shaders/add-f32-256.wgsl")).unwrap();
    assert!(text.contains("alias Elem = f32;") && text.contains("fn add("), "{text}");
}

#[test]
fn errors_say_what_is_wrong() {
    let nobody = WebGpu::<f32>::with_adapter("no such adapter").unwrap_err().to_string();
    assert!(nobody.contains("no adapter is `no such adapter`"), "{nobody}");
    let gpu = or_return!(shared_f32());
    let none = WebGpu::<bf16>::from_device(gpu.wgpu_device().clone(), gpu.wgpu_queue().clone()).unwrap_err();
    assert_eq!(none.to_string(), "webgpu is unavailable: WGSL has no bf16");
    let huge = Tensor::<_, f32>::zeros(&gpu, (1 << 20, 1 << 20)).unwrap_err();
    assert!(matches!(huge, Error::TooLarge { .. }), "{huge}");
}

/// If a submission fails, every later read is an error, so that unwritten results are never returned.
#[test]
fn a_submission_that_fails_is_every_later_error() {
    or_return!(shared_f32());
    let gpu = WebGpu::<f32>::new().unwrap();
    let x = Tensor::from_slice(&gpu, (3, 3), &[1.0f32; 9]).unwrap();
    let mut y = Tensor::zeros(&gpu, (3, 3)).unwrap();
    let raw = gpu.upload(&[1.0f32; 64]).unwrap();
    Add { x: x.view(), y: y.view_mut() }.run(&gpu).unwrap();
    gpu.record(move |encoder| encoder.copy_buffer_to_buffer(raw.raw(), 1, raw.raw(), 128, 4)); // 1 is no multiple of 4
    for _ in 0..2 {
        let error = y.to_vec(&gpu).unwrap_err();
        assert!(matches!(error, Error::Device { .. }), "{error}");
    }
}

/// Products of two f16 have 22 bits, and below 2⁻¹⁴ f16 holds fewer and fewer of them: every tie, both signs, down to 0.
#[test]
fn what_is_tiny_in_f16_is_rounded_to_nearest_even() {
    let gpu = or_return!(shared_f16());
    let numbers = |exponents: std::ops::RangeInclusive<i32>| -> Vec<f16> {
        let parts = [1024, 1025, 1026, 1027, 1279, 1280, 1281, 1535, 1536, 1537, 2046, 2047];
        let number = |exponent: i32, parts: i32| parts as f32 * f32::exp2((exponent - 10) as f32);
        exponents
            .flat_map(|e| parts.map(|parts| f16::from_f32(if e % 2 == 0 { number(e, parts) } else { -number(e, parts) })))
            .collect()
    };
    let (x, w) = (numbers(-13..=-1), numbers(-14..=-1));
    let [columns, rows] = [&x, &w].map(|side| Tensor::from_slice(&gpu, (side.len(), 1), side).unwrap());
    let mut y = unwritten(&gpu, x.len(), w.len());
    LinearForward { x: columns.view(), w: (&rows).into(), bias: None, y: (&mut y).into() }.run(&gpu).unwrap();
    let want: Vec<f16> = x.iter().flat_map(|x| w.iter().map(|w| f16::from_f32(x.to_f32() * w.to_f32()))).collect();
    assert_eq!(y.to_vec(&gpu).unwrap(), want);
}

#[test]
fn a_lost_device_is_an_error() {
    or_return!(shared_f32());
    let gpu = WebGpu::<f32>::new().unwrap();
    let tensor = Tensor::<_, f32>::zeros(&gpu, (3, 3)).unwrap();
    gpu.wgpu_device().destroy();
    assert!(matches!(tensor.to_vec(&gpu), Err(Error::Device { .. })));
    assert!(matches!(gpu.synchronize(), Err(Error::Device { .. })));
    // An upload is only recorded, so it may fail as late as the next download.
    let late = Tensor::from_slice(&gpu, (1, 1), &[1.0f32]).and_then(|tensor| tensor.to_vec(&gpu));
    assert!(matches!(late, Err(Error::Device { .. })));
}
