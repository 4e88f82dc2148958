//! The kernels that ship, on the emulated device: tile edges of the tensor cores, and seeded bugs that must be caught.
#![cfg(feature = "cuda")]

mod support;

use lowrank::op::{Dropout, LinearBackward, LinearForward, LoraBackward, LoraForward};
use lowrank::{Backend, Cuda, DType, Error, Float, bf16, f16};
use support::bounds::{assert_exact, assert_within};
use support::data::{Dims, down, mask, random, unwritten, up, whole};
use support::emulator::Emulator;
use support::oracle::{Lora, Mat};

/// `h` and `y` of a layer.
fn forward<B: Backend>(backend: &B, layer: &Lora, dropout: Option<Dropout>) -> Result<(Vec<f32>, Vec<B::Elem>), Error> {
    let [x, w, a, b] = [&layer.x, &layer.w, &layer.a, &layer.b].map(|mat| up(backend, mat));
    let bias = layer.bias.as_ref().map(|mat| up(backend, mat));
    let (scale, m) = (layer.scale as f32, x.rows());
    let (mut h, mut y) = (unwritten(backend, m, a.rows()), unwritten(backend, m, w.rows()));
    let op = LoraForward { x: &x, w: Some(&w), bias: bias.as_ref(), a: &a, b: &b, scale, dropout, h: &mut h, y: &mut y };
    op.run(backend)?;
    Ok((down(backend, &h), down(backend, &y)))
}

/// `dA` and `dx` of a layer.
fn backward<B: Backend>(backend: &B, layer: &Lora, dropout: Option<Dropout>) -> Result<(Vec<f32>, Vec<B::Elem>), Error> {
    let [x, w, a, b, dy] = [&layer.x, &layer.w, &layer.a, &layer.b, &layer.dy].map(|mat| up(backend, mat));
    let (h, scale) = (up(backend, &layer.run().h), layer.scale as f32);
    let (mut da, mut db) = (unwritten(backend, a.rows(), x.cols()), unwritten(backend, w.rows(), a.rows()));
    let mut dx = unwritten(backend, x.rows(), x.cols());
    let (x, w, a, b, h, dy) = (&x, Some(&w), &a, &b, &h, &dy);
    LoraBackward { x, w, a, b, h, dy, scale, dropout, da: &mut da, db: &mut db, dbias: None, dx: Some(&mut dx) }.run(backend)?;
    Ok((down(backend, &da), down(backend, &dx)))
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
        let want = layer.run();
        assert_exact(&format!("{dims:?} y"), &forward(&backend, &layer, None).unwrap().1, &want.y);
        assert_exact(&format!("{dims:?} dx"), &backward(&backend, &layer, None).unwrap().1, &want.dx);
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
        let (_, y) = forward(&backend, &layer, Some(dropout)).unwrap();
        let (_, dx) = backward(&backend, &layer, Some(dropout)).unwrap();
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

/// Which half of a layer a kernel belongs to.
#[derive(Clone, Copy)]
enum Pass {
    Forward,
    Backward,
}

/// What becomes of a layer of whole numbers, for which every result is exact.
fn verdict<E: Float>(backend: &Cuda<E, Emulator>, pass: Pass, dims: Dims, dropout: Option<Dropout>) -> Verdict {
    let ones = dropout.map_or_else(|| whole(dims, 1).mask, |dropout| mask(dropout, dims.m, dims.k));
    let layer = Lora { mask: ones, ..whole(dims, 1) };
    let want = layer.run();
    let right = match pass {
        Pass::Forward => forward(backend, &layer, dropout).map(|(h, y)| equal(&h, &want.h) && equal(&y, &want.y)),
        Pass::Backward => backward(backend, &layer, dropout).map(|(da, dx)| equal(&da, &want.da) && equal(&dx, &want.dx)),
    };
    match right {
        Ok(true) => Verdict::Survives,
        Ok(false) => Verdict::WrongResult,
        Err(Error::Device { reason, .. }) => Verdict::Fault(reason),
        Err(error) => panic!("{error}"),
    }
}

fn equal<T: Float>(got: &[T], want: &Mat) -> bool {
    got.iter().zip(&want.data).all(|(got, want)| *got == T::from_f32(*want as f32))
}

/// What becomes of each mutant in the first shape that it does not survive, without and with dropout.
fn verdicts<E: Float>(kernel: &str, from: &str, to: &str, pass: Pass, shapes: &[Dims]) -> Vec<Verdict> {
    let halves = Dropout::new(0.5, 7).unwrap(); // keeps whole numbers whole
    let mutants = (0..).map_while(|nth| mutant(E::DTYPE, kernel, from, to, nth));
    let judge = |ptx: String| {
        let backend = Cuda::on(Emulator::with_ptx(E::DTYPE, &ptx));
        let cases = [None, Some(halves)].into_iter().flat_map(|dropout| shapes.iter().map(move |&dims| (dims, dropout)));
        let mut verdicts = cases.map(|(dims, dropout)| verdict::<E>(&backend, pass, dims, dropout));
        verdicts.find(|verdict| *verdict != Verdict::Survives).unwrap_or(Verdict::Survives)
    };
    let verdicts: Vec<_> = mutants.map(judge).collect();
    assert!(!verdicts.is_empty(), "{kernel} has no `{from}`");
    verdicts
}

/// Asserts that every mutant is stopped with a fault that names one of `reasons`.
fn assert_faults<E: Float>(kernel: &str, [from, to]: [&str; 2], pass: Pass, dims: Dims, reasons: &[&str]) {
    for verdict in verdicts::<E>(kernel, from, to, pass, &[dims]) {
        let named = |fault: &str| reasons.iter().any(|reason| fault.contains(reason));
        assert!(matches!(&verdict, Verdict::Fault(fault) if named(fault)), "{kernel}: `{to}` for `{from}`: {verdict:?}");
    }
}

/// Each size ends in another quarter of a tile, of a panel's depth and of a thread's rows; the last before its last element.
const QUARTERS: [Dims; 5] = [
    Dims { m: 65, k: 67, n: 66, r: 67 },
    Dims { m: 22, k: 20, n: 23, r: 21 },
    Dims { m: 43, k: 40, n: 41, r: 42 },
    Dims { m: 60, k: 62, n: 61, r: 60 },
    Dims { m: 48, k: 48, n: 48, r: 48 },
];
const ALIGNED: Dims = Dims { m: 129, k: 136, n: 104, r: 18 };

#[test]
fn every_barrier_is_needed_and_missed() {
    let (removed, reasons) = (["bar.sync \t0;", ""], ["race", "nothing wrote", "asynchronous copy"]);
    assert_faults::<f32>("lora_forward_y", removed, Pass::Forward, QUARTERS[0], &reasons);
    assert_faults::<bf16>("lora_backward_dx_tensor", removed, Pass::Backward, ALIGNED, &reasons);
}

#[test]
fn every_bound_that_is_off_by_one_is_caught() {
    // The guards of loads and stores: `i >= n` becomes `i > n`.
    for (kernel, pass) in [("lora_forward_h", Pass::Forward), ("lora_backward_da", Pass::Backward)] {
        let verdicts = verdicts::<f32>(kernel, "setp.ge.s32", "setp.gt.s32", pass, &QUARTERS);
        let survivors: Vec<_> = (0..).zip(&verdicts).filter(|(_, verdict)| **verdict == Verdict::Survives).collect();
        assert!(survivors.is_empty(), "{kernel}: of {} mutants these survive: {survivors:?}", verdicts.len());
    }
}

#[test]
fn a_copy_that_is_not_waited_for_is_caught() {
    let early = ["cp.async.wait_group 1;", "cp.async.wait_group 2;"];
    assert_faults::<bf16>("lora_forward_y_tensor", early, Pass::Forward, ALIGNED, &["asynchronous copy"]);
}

#[test]
fn a_wrong_address_is_caught() {
    // Fragments with rows and columns exchanged; copies of 16 bytes from one element further.
    let (rows, columns) = ("x4.shared.b16 {", "x4.trans.shared.b16 {");
    let exchanged = verdicts::<bf16>("lora_forward_y_tensor", rows, columns, Pass::Forward, &[ALIGNED]);
    assert!(exchanged.iter().all(|verdict| *verdict == Verdict::WrongResult), "{exchanged:?}");
    let further = ["], 16, %r", "+2], 16, %r"];
    assert_faults::<bf16>("lora_backward_dx_tensor", further, Pass::Backward, ALIGNED, &["misaligned"]);
}
