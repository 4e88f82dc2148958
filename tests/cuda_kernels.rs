//! The kernels that ship, on the emulated device: tile edges of the tensor cores, and seeded bugs that must be caught.
#![cfg(feature = "cuda")]

mod support;

use std::cell::RefCell;

use lowrank::cuda::{Device, Gpu, Launch};
use lowrank::op::{Dropout, LinearBackward, LinearForward, LoraBackward, LoraForward, LoraMerge, Rounding};
use lowrank::{Backend, Cuda, DType, Error, Float, Tensor, bf16, f16};
use support::bounds::{assert_exact, assert_within};
use support::data::{Dims, down, mask, random, unwritten, up, whole};
use support::emulator::Emulator;
use support::oracle::{Lora, Mat};
use support::suite::lora_is_exact_at;

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

/// `dA`, `dB`, `dbias` and `dx` of a layer.
type Gradients<E> = (Vec<f32>, Vec<f32>, Vec<f32>, Vec<E>);

fn backward<B: Backend>(backend: &B, layer: &Lora, dropout: Option<Dropout>) -> Result<Gradients<B::Elem>, Error> {
    let [x, w, a, b, dy] = [&layer.x, &layer.w, &layer.a, &layer.b, &layer.dy].map(|mat| up(backend, mat));
    let (h, scale) = (up(backend, &layer.run().h), layer.scale as f32);
    let (mut da, mut db) = (unwritten(backend, a.rows(), x.cols()), unwritten(backend, w.rows(), a.rows()));
    let (mut dbias, mut dx) = (unwritten(backend, 1, w.rows()), unwritten(backend, x.rows(), x.cols()));
    let (x, w, a, b, h, dy) = (&x, Some(&w), &a, &b, &h, &dy);
    let (da_, db_, dbias_, dx_) = (&mut da, &mut db, Some(&mut dbias), Some(&mut dx));
    LoraBackward { x, w, a, b, h, dy, scale, dropout, da: da_, db: db_, dbias: dbias_, dx: dx_ }.run(backend)?;
    Ok((down(backend, &da), down(backend, &db), down(backend, &dbias), down(backend, &dx)))
}

/// The merged weight of a layer.
fn merge<B: Backend>(backend: &B, layer: &Lora) -> Result<Vec<B::Elem>, Error> {
    let (a, b, mut w) = (up(backend, &layer.a), up(backend, &layer.b), up(backend, &layer.w));
    LoraMerge { a: &a, b: &b, scale: layer.scale as f32, rounding: Rounding::Nearest, w: &mut w }.run(backend)?;
    Ok(down(backend, &w))
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
        assert_exact(&format!("{dims:?} dx"), &backward(&backend, &layer, None).unwrap().3, &want.dx);
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

/// Both sides of every edge of the narrow engine (16 rows, 32 or 16 columns of y, 16 of h, 256 or 128 of the depth), of where it
/// ends (64 rows, rank 16), of bands (256 columns, 16 rows, rank 16) and of merging (128 rows, 32 to 256 columns, rank 16).
fn narrow_shapes() -> Vec<Dims> {
    let few_rows = [(1, 8, 1, 1), (15, 256, 31, 16), (16, 264, 32, 15), (17, 248, 33, 17), (64, 40, 32, 16), (65, 40, 33, 16)];
    let bands = [(17, 257, 255, 17), (33, 255, 257, 16), (16, 256, 256, 33), (2, 520, 65, 8), (3, 8, 0, 2), (0, 8, 3, 2)];
    let merges = [(1, 264, 127, 16), (1, 32, 129, 17), (1, 31, 128, 33), (1, 33, 129, 1)];
    let all = [&few_rows[..], &bands, &merges].concat();
    all.into_iter().map(|(m, k, n, r)| Dims { m, k, n, r }).collect()
}

fn narrow_products_are_exact_on_whole_numbers<E: Float>() {
    let backend = Emulator::backend::<E>();
    let halves = Dropout::new(0.5, 7).unwrap(); // keeps whole numbers whole
    for (seed, dims) in narrow_shapes().into_iter().enumerate() {
        lora_is_exact_at(&backend, dims, seed as u64);
        let layer = Lora { mask: mask(halves, dims.m, dims.k), ..whole(dims, seed as u64) };
        let ((h, y), want) = (forward(&backend, &layer, Some(halves)).unwrap(), layer.run());
        assert_exact(&format!("{dims:?} h with dropout"), &h, &want.h);
        assert_exact(&format!("{dims:?} y with dropout"), &y, &want.y);
    }
}

#[test]
fn narrow_products_are_exact_on_whole_numbers_f32() {
    narrow_products_are_exact_on_whole_numbers::<f32>();
}

#[test]
fn narrow_products_are_exact_on_whole_numbers_f16() {
    narrow_products_are_exact_on_whole_numbers::<f16>();
}

#[test]
fn narrow_products_are_exact_on_whole_numbers_bf16() {
    narrow_products_are_exact_on_whole_numbers::<bf16>();
}

/// So many rows that a block walks down its band in several steps.
#[test]
fn many_rows_are_exact_on_whole_numbers() {
    lora_is_exact_at(&Emulator::backend::<bf16>(), TALL, 1);
}

/// An update of zeros does not change a bit: `y`'s kernel adds it last.
#[test]
fn a_fresh_adapter_gives_the_bits_of_the_base_layer() {
    let backend = Emulator::backend::<bf16>();
    for dims in [Dims { m: 3, k: 520, n: 33, r: 16 }, Dims { m: 70, k: 64, n: 33, r: 4 }] {
        let layer = random::<bf16>(dims, 1.0, 2);
        let fresh = Lora { b: layer.b.map(|_| 0.0), ..layer.clone() };
        let [x, w] = [&layer.x, &layer.w].map(|mat| up(&backend, mat));
        let (bias, mut y) = (layer.bias.as_ref().map(|mat| up(&backend, mat)), unwritten(&backend, dims.m, dims.n));
        LinearForward { x: &x, w: &w, bias: bias.as_ref(), y: &mut y }.run(&backend).unwrap();
        assert_eq!(down(&backend, &y), forward(&backend, &fresh, None).unwrap().1, "{dims:?}");
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
        let (.., dx) = backward(&backend, &layer, Some(dropout)).unwrap();
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
    Merge,
}

/// What becomes of a layer of whole numbers, for which every result is exact.
fn verdict<E: Float>(backend: &Cuda<E, Emulator>, pass: Pass, dims: Dims, dropout: Option<Dropout>) -> Verdict {
    let ones = dropout.map_or_else(|| whole(dims, 1).mask, |dropout| mask(dropout, dims.m, dims.k));
    let layer = Lora { mask: ones, ..whole(dims, 1) };
    let want = layer.run();
    let right = match pass {
        Pass::Forward => forward(backend, &layer, dropout).map(|(h, y)| equal(&h, &want.h) && equal(&y, &want.y)),
        Pass::Backward => backward(backend, &layer, dropout).map(|(da, db, dbias, dx)| {
            equal(&da, &want.da) && equal(&db, &want.db) && equal(&dbias, &want.dbias) && equal(&dx, &want.dx)
        }),
        Pass::Merge => merge(backend, &layer).map(|w| equal(&w, &layer.merged())),
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
/// Its last row is another one of a step's eight.
const EIGHTHS: [Dims; 9] = [
    Dims { m: 1, k: 7, n: 9, r: 3 },
    Dims { m: 2, k: 7, n: 9, r: 5 },
    Dims { m: 19, k: 255, n: 257, r: 17 },
    Dims { m: 36, k: 7, n: 9, r: 15 },
    Dims { m: 5, k: 256, n: 255, r: 16 },
    Dims { m: 22, k: 257, n: 256, r: 2 },
    Dims { m: 7, k: 7, n: 9, r: 14 },
    Dims { m: 40, k: 3, n: 3, r: 20 },
    Dims { m: 33, k: 3, n: 3, r: 4 },
];
/// Its last row is another one of a lane's four, its rank ends in either half of a step; for lanes of one column and of several.
fn merges() -> Vec<Dims> {
    let sizes = [(1, 3), (34, 16), (67, 17), (132, 5), (43, 15), (26, 31)];
    let dims = |k| sizes.map(|(n, r)| Dims { m: 1, k, n, r });
    [dims(33), dims(132)].concat()
}
const ALIGNED: Dims = Dims { m: 129, k: 136, n: 104, r: 18 };

const TALL: Dims = Dims { m: 4300, k: 8, n: 8, r: 2 };

#[test]
fn every_barrier_is_needed_and_missed() {
    let (removed, reasons) = (["bar.sync \t0;", ""], ["race", "nothing wrote", "asynchronous copy"]);
    assert_faults::<f32>("lora_forward_y", removed, Pass::Forward, QUARTERS[0], &reasons);
    assert_faults::<bf16>("lora_backward_dx_tensor", removed, Pass::Backward, ALIGNED, &reasons);
    let few_rows = Dims { m: 5, k: 64, n: 40, r: 9 };
    assert_faults::<bf16>("lora_forward_y_narrow", removed, Pass::Forward, few_rows, &reasons);
    assert_faults::<f32>("lora_forward_h_narrow", removed, Pass::Forward, few_rows, &reasons);
    for kernel in ["lora_backward_dy", "lora_backward_da"] {
        assert_faults::<f32>(kernel, removed, Pass::Backward, TALL, &reasons);
    }
    assert_faults::<bf16>("lora_merge_wide", removed, Pass::Merge, Dims { m: 1, k: 40, n: 70, r: 20 }, &reasons);
}

#[test]
fn every_bound_that_is_off_by_one_is_caught() {
    // The guards of loads and stores: `i >= n` becomes `i > n`.
    let merges = merges();
    let kernels = [
        ("lora_forward_h", Pass::Forward, &QUARTERS[..]),
        ("lora_backward_da", Pass::Backward, &EIGHTHS),
        ("lora_backward_dy", Pass::Backward, &EIGHTHS),
        ("lora_merge", Pass::Merge, &merges[..]),
        ("lora_merge_wide", Pass::Merge, &merges[..]),
    ];
    for (kernel, pass, shapes) in kernels {
        let verdicts = verdicts::<f32>(kernel, "setp.ge.s32", "setp.gt.s32", pass, shapes);
        let survivors = (0..).zip(&verdicts).filter(|(_, verdict)| **verdict == Verdict::Survives).count();
        // One is no bug: a block without rows that walks one step adds zeros.
        let harmless = usize::from(kernel == "lora_backward_dy");
        assert!(survivors == harmless, "{kernel}: {survivors} survive: {verdicts:?}");
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

#[test]
fn products_of_the_wrong_part_are_caught() {
    // A product of some tile that is left out, in steps of the depth that come in pairs; a load with its guard the wrong way round.
    let few_rows = [1000, 520].map(|k| Dims { m: 13, k, n: 40, r: 12 });
    for [from, to] in [["mma.sync.aligned", "// "], ["@has ld.global.nc", "@!has ld.global.nc"]] {
        let verdicts = verdicts::<bf16>("lora_forward_y_narrow", from, to, Pass::Forward, &few_rows);
        assert!(verdicts.iter().all(|verdict| *verdict != Verdict::Survives), "`{to}` for `{from}`: {verdicts:?}");
    }
}

/// What a verb asks of the device.
#[derive(Default)]
struct Asked {
    launches: usize,
    copies: usize,
    scratch: usize,
}

/// The emulator, and a count of what it is asked.
struct Counting(Emulator, RefCell<Asked>);

impl Device for Counting {
    type Memory = <Emulator as Device>::Memory;

    fn name(&self) -> String {
        self.0.name()
    }
    fn gpu(&self) -> Gpu {
        self.0.gpu()
    }
    fn alloc(&self, bytes: usize) -> Result<Self::Memory, Error> {
        self.1.borrow_mut().scratch += bytes;
        self.0.alloc(bytes)
    }
    fn zeros(&self, bytes: usize) -> Result<Self::Memory, Error> {
        self.1.borrow_mut().scratch += bytes;
        self.0.zeros(bytes)
    }
    fn write(&self, memory: &mut Self::Memory, host: &[u8]) -> Result<(), Error> {
        self.1.borrow_mut().copies += 1;
        self.0.write(memory, host)
    }
    fn read(&self, memory: &Self::Memory, host: &mut [u8]) -> Result<(), Error> {
        self.1.borrow_mut().copies += 1;
        self.0.read(memory, host)
    }
    fn launch(&self, launch: Launch<'_, Self::Memory>) -> Result<(), Error> {
        self.1.borrow_mut().launches += 1;
        self.0.launch(launch)
    }
    fn synchronize(&self) -> Result<(), Error> {
        panic!("a verb does not wait");
    }
}

/// A forward pass is one launch for few rows, else two; merging is one; backward five at most. None of them copies anything, none
/// but backward takes memory, and that is a small part of the weight's.
#[test]
fn verbs_launch_little_copy_nothing_and_need_no_memory_like_the_weights() {
    for (m, r, dropout, forward_launches) in [(1, 16, false, 1), (16, 17, false, 2), (16, 4, true, 2), (80, 8, false, 2)] {
        let layer = whole(Dims { m, k: 512, n: 520, r }, 1);
        let backend = Cuda::<bf16, _>::on(Counting(Emulator::new(DType::BF16), RefCell::default()));
        let [x, mut w, a, b, dy] = [&layer.x, &layer.w, &layer.a, &layer.b, &layer.dy].map(|mat| up(&backend, mat));
        let (mut h, mut y) = (unwritten(&backend, m, r), unwritten(&backend, m, 520));
        let (mut da, mut db): (Tensor<_, f32>, Tensor<_, f32>) = (unwritten(&backend, r, 512), unwritten(&backend, 520, r));
        let (mut dbias, mut dx) = (unwritten(&backend, 1, 520), unwritten(&backend, m, 512));
        let dropout = dropout.then(|| Dropout::new(0.5, 1).unwrap());
        let asked = || backend.on_device().1.take();

        asked();
        let (scale, rounding) = (0.5, Rounding::Stochastic { seed: 1 });
        LoraForward { x: &x, w: Some(&w), bias: None, a: &a, b: &b, scale, dropout, h: &mut h, y: &mut y }.run(&backend).unwrap();
        let Asked { launches, copies, scratch } = asked();
        assert_eq!((launches, copies, scratch), (forward_launches, 0, 0), "forward, {m} rows, rank {r}");

        let (w_, da_, db_, dbias_, dx_) = (Some(&w), &mut da, &mut db, Some(&mut dbias), Some(&mut dx));
        let (x, a, b, h, dy) = (&x, &a, &b, &h, &dy);
        LoraBackward { x, w: w_, a, b, h, dy, scale, dropout, da: da_, db: db_, dbias: dbias_, dx: dx_ }.run(&backend).unwrap();
        let Asked { launches, copies, scratch } = asked();
        assert!(launches <= 5 && copies == 0, "backward, {m} rows: {launches} launches, {copies} copies");
        assert!(scratch <= 2 * 512 * 520 / 2, "backward, {m} rows, rank {r}: {scratch} bytes");

        LoraMerge { a, b, scale, rounding, w: &mut w }.run(&backend).unwrap();
        let Asked { launches, copies, scratch } = asked();
        assert_eq!((launches, copies, scratch), (1, 0, 0), "merge");
    }
}
