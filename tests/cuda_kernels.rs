//! The kernels that ship, on the emulated device: tile edges of the tensor cores, and seeded bugs that must be caught.
#![cfg(feature = "cuda")]

mod support;

use lowrank::op::{Dropout, LinearBackward, LinearForward, LoraBackward, LoraForward};
use lowrank::{Backend, Cuda, DType, Error, Float, bf16, f16};
use support::bounds::{assert_exact, assert_within};
use support::data::{Dims, down, mask, random, unwritten, up, whole};
use support::emulator::Emulator;
use support::oracle::Lora;

/// `y` and `dx` of a layer: the two products that have a kernel for tensor cores.
fn y_and_dx<B: Backend>(backend: &B, layer: &Lora, dropout: Option<Dropout>) -> Result<[Vec<B::Elem>; 2], Error> {
    let (m, k, n, r) = (layer.x.rows, layer.x.cols, layer.w.rows, layer.a.rows);
    let [x, w, a, b, dy] = [&layer.x, &layer.w, &layer.a, &layer.b, &layer.dy].map(|mat| up(backend, mat));
    let bias = layer.bias.as_ref().map(|mat| up(backend, mat));
    let (scale, mut h, mut y) = (layer.scale as f32, unwritten(backend, m, r), unwritten(backend, m, n));
    let forward = LoraForward { x: &x, w: &w, bias: bias.as_ref(), a: &a, b: &b, scale, dropout, h: &mut h, y: &mut y };
    forward.run(backend)?;
    let (mut da, mut db, mut dx) = (unwritten(backend, r, k), unwritten(backend, n, r), unwritten(backend, m, k));
    let (x, w, a, b, h, dy) = (&x, &w, &a, &b, &h, &dy);
    LoraBackward { x, w, a, b, h, dy, scale, dropout, da: &mut da, db: &mut db, dbias: None, dx: Some(&mut dx) }.run(backend)?;
    Ok([down(backend, &y), down(backend, &dx)])
}

/// Both sides of every edge of the 128×128 tile, of its depth of 32 and of the stages that are fetched ahead.
fn tensor_shapes() -> Vec<Dims> {
    let shapes = [(127, 8, 128, 3), (128, 40, 136, 16), (129, 64, 8, 17), (1, 104, 120, 1), (16, 32, 264, 5), (33, 96, 16, 8)];
    shapes.into_iter().map(|(m, k, n, r)| Dims { m, k, n, r }).collect()
}

fn tensor_cores_are_exact_on_whole_numbers<E: Float>() {
    let backend = Emulator::backend::<E>();
    for (seed, dims) in tensor_shapes().into_iter().enumerate() {
        let layer = whole(dims, seed as u64);
        let ([y, dx], want) = (y_and_dx(&backend, &layer, None).unwrap(), layer.run());
        assert_exact(&format!("{dims:?} y"), &y, &want.y);
        assert_exact(&format!("{dims:?} dx"), &dx, &want.dx);
    }
    // dW has both operands transposed, and its depth is the batch.
    for (seed, dims) in [(1, 136, 8, 1), (31, 128, 128, 1), (33, 8, 136, 1), (100, 16, 24, 1)].into_iter().enumerate() {
        let (m, k, n, _) = dims;
        let layer = whole(Dims { m, k, n, r: 1 }, seed as u64);
        let [x, w, dy] = [&layer.x, &layer.w, &layer.dy].map(|mat| up(&backend, mat));
        let (mut y, mut dw, mut dx) = (unwritten(&backend, m, n), unwritten(&backend, n, k), unwritten(&backend, m, k));
        LinearForward { x: &x, w: &w, bias: None, y: &mut y }.run(&backend).unwrap();
        let backward = LinearBackward { x: &x, w: &w, dy: &dy, dx: Some(&mut dx), dw: Some(&mut dw), dbias: None };
        backward.run(&backend).unwrap();
        assert_exact(&format!("{dims:?} y"), &down(&backend, &y), &(&layer.x * &layer.w.t()));
        assert_exact(&format!("{dims:?} dx"), &down(&backend, &dx), &(&layer.dy * &layer.w));
        assert_exact(&format!("{dims:?} dw"), &down(&backend, &dw), &(&layer.dy.t() * &layer.x));
    }
}

#[test]
fn tensor_cores_are_exact_on_whole_numbers_f16() {
    tensor_cores_are_exact_on_whole_numbers::<f16>();
}

#[test]
fn tensor_cores_are_exact_on_whole_numbers_bf16() {
    tensor_cores_are_exact_on_whole_numbers::<bf16>();
}

#[test]
fn tensor_cores_round_within_bounds_and_drop_what_the_mask_says() {
    let backend = Emulator::backend::<bf16>();
    for (seed, dims) in tensor_shapes().into_iter().enumerate() {
        let dropout = Dropout::new(0.3, seed as u64).unwrap();
        let layer = Lora { mask: mask(dropout, dims.m, dims.k), ..random::<bf16>(dims, 0.7, seed as u64) };
        let [y, dx] = y_and_dx(&backend, &layer, Some(dropout)).unwrap();
        let (want, size) = (layer.run(), layer.magnitudes().run());
        assert_within(&format!("{dims:?} y"), &y, &want.y, &size.y, dims.k + dims.r + 4);
        assert_within(&format!("{dims:?} dx"), &dx, &want.dx, &size.dx, dims.n + dims.r + 5);
    }
}

/// The PTX of one module in which the `nth` occurrence of `from`, counted inside one kernel, is replaced; None: there is none.
fn mutant(dtype: DType, kernel: &str, from: &str, to: &str, nth: usize) -> Option<String> {
    let ptx = lowrank::cuda::ptx(dtype);
    let start = ptx.find(&format!(".entry {kernel}_{dtype}("))?;
    let end = ptx[start..].find("\n}").map_or(ptx.len(), |end| start + end);
    let (at, _) = ptx[start..end].match_indices(from).nth(nth)?;
    let at = start + at;
    Some([&ptx[..at], to, &ptx[at + from.len()..]].concat())
}

/// What became of a mutant.
#[derive(Debug, PartialEq)]
enum Verdict {
    Fault(String),
    WrongResult,
    Survives,
}

fn verdict<E: Float>(ptx: &str, dims: Dims) -> Verdict {
    let layer = whole(dims, 1);
    let backend: Cuda<E, Emulator> = Cuda::on(Emulator::with_ptx(E::DTYPE, ptx));
    let right = |got: &[E], want: &[f64]| got.iter().zip(want).all(|(got, want)| *got == E::from_f32(*want as f32));
    match (y_and_dx(&backend, &layer, None), layer.run()) {
        (Err(Error::Device { reason, .. }), _) => Verdict::Fault(reason),
        (Err(error), _) => panic!("{error}"),
        (Ok([y, dx]), want) if right(&y, &want.y.data) && right(&dx, &want.dx.data) => Verdict::Survives,
        _ => Verdict::WrongResult,
    }
}

/// What becomes of each mutant in a forward and backward pass of the first shape that it does not survive.
fn verdicts<E: Float>(kernel: &str, from: &str, to: &str, shapes: &[Dims]) -> Vec<Verdict> {
    let mutants = (0..).map_while(|nth| mutant(E::DTYPE, kernel, from, to, nth));
    let judge = |ptx: String| {
        let mut verdicts = shapes.iter().map(|&dims| verdict::<E>(&ptx, dims));
        verdicts.find(|verdict| *verdict != Verdict::Survives).unwrap_or(Verdict::Survives)
    };
    let verdicts: Vec<_> = mutants.map(judge).collect();
    assert!(!verdicts.is_empty(), "{kernel} has no `{from}`");
    verdicts
}

/// Asserts that every mutant is stopped with a fault that names one of `reasons`.
fn assert_faults<E: Float>(kernel: &str, from: &str, to: &str, dims: Dims, reasons: &[&str]) {
    for verdict in verdicts::<E>(kernel, from, to, &[dims]) {
        let named = |fault: &str| reasons.iter().any(|reason| fault.contains(reason));
        assert!(matches!(&verdict, Verdict::Fault(fault) if named(fault)), "{kernel}: `{to}` for `{from}`: {verdict:?}");
    }
}

/// Each size ends in another quarter of a tile, of a panel's depth and of a thread's rows.
const QUARTERS: [Dims; 4] = [
    Dims { m: 65, k: 67, n: 66, r: 68 },
    Dims { m: 22, k: 20, n: 23, r: 21 },
    Dims { m: 43, k: 40, n: 41, r: 42 },
    Dims { m: 60, k: 62, n: 61, r: 63 },
];
const ALIGNED: Dims = Dims { m: 129, k: 136, n: 104, r: 18 };

#[test]
fn every_barrier_is_needed_and_missed() {
    let reasons = ["race", "nothing wrote", "asynchronous copy"];
    assert_faults::<f32>("lora_forward_y", "bar.sync \t0;", "", QUARTERS[0], &reasons);
    assert_faults::<f32>("lora_backward_dx", "bar.sync \t0;", "", QUARTERS[0], &reasons);
}

#[test]
fn every_bound_that_is_off_by_one_is_caught() {
    // The guards of loads and stores: `i >= n` becomes `i > n`.
    for kernel in ["lora_forward_h", "lora_backward_dx"] {
        let verdicts = verdicts::<f32>(kernel, "setp.ge.s32", "setp.gt.s32", &QUARTERS);
        let survivors = verdicts.iter().filter(|&verdict| *verdict == Verdict::Survives).count();
        println!("{kernel}: {survivors} of {} survive", verdicts.len());
    }
}

#[test]
fn a_copy_that_is_not_waited_for_is_caught() {
    let (from, to) = ("cp.async.wait_group 1;", "cp.async.wait_group 2;");
    assert_faults::<bf16>("lora_forward_y_tensor", from, to, ALIGNED, &["asynchronous copy"]);
}

#[test]
fn a_wrong_address_is_caught() {
    // Fragments with rows and columns exchanged; copies of 16 bytes from one element further.
    let exchanged = verdicts::<bf16>("lora_forward_y_tensor", "x4.shared.b16 {", "x4.trans.shared.b16 {", &[ALIGNED]);
    assert!(exchanged.iter().all(|verdict| *verdict == Verdict::WrongResult), "{exchanged:?}");
    assert_faults::<bf16>("lora_backward_dx_tensor", "], 16, %r", "+2], 16, %r", ALIGNED, &["misaligned"]);
}
