//! Loops of training, decoding and bare verbs do not allocate after the first few iterations.
//!
//! Counted are the calls of the global allocator by the threads that compute, and, for memory that is mapped directly, page
//! faults. The loops run inside a thread pool, because rayon allocates a block every few dozen calls when work comes from
//! outside.
#![allow(unsafe_code, reason = "an allocator that counts is an allocator")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use lowrank::autograd::{Gradients, Tape};
use lowrank::nn::{Adam, Adaptable, Bias, LoraConfig, Mlp, Targets};
use lowrank::op::{self, AdamRate, Dropout, Labels, Rounding, WeightGrad};
use lowrank::random::Rng;
use lowrank::{Cpu, Float, MatMut, MatRef, Result, Tensor, bf16};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

/// The number of the pool that is counted: threads of earlier pools may still be ending.
static POOL: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// The number of the pool that this thread belongs to; 0 for other threads.
    static MEMBER_OF: Cell<usize> = const { Cell::new(0) };
}

fn count() {
    if MEMBER_OF.try_with(Cell::get).is_ok_and(|pool| pool != 0 && pool == POOL.load(Ordering::Relaxed)) {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: every call is passed on to the system's allocator unchanged; counting does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller upholds the contract of the system's allocator.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, size) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// The number of page faults of this process: first accesses to mapped pages.
fn page_faults() -> usize {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default(); // only on Linux; elsewhere none are counted
    stat.rsplit(')').next().and_then(|fields| fields.split_whitespace().nth(7)?.parse().ok()).unwrap_or(0)
}

const WARM_UP: usize = 5;

/// Runs warm-up steps, then this many steps, which are counted.
struct Steps {
    next: usize,
    last: usize,
    allocations: usize,
    faults: usize,
}

impl Iterator for &mut Steps {
    type Item = ();
    fn next(&mut self) -> Option<()> {
        if self.next == self.last {
            self.allocations = ALLOCATIONS.load(Ordering::Relaxed) - self.allocations;
            self.faults = page_faults().wrapping_sub(self.faults);
            return None;
        }
        if self.next == WARM_UP {
            self.faults = page_faults();
            self.allocations = ALLOCATIONS.load(Ordering::Relaxed);
        }
        self.next += 1;
        Some(())
    }
}

/// Makes each of two threads steal a task from the other: rayon allocates a little when a thread steals for the first time, which
/// may happen long after the warm-up on a busy machine.
fn steal_once() {
    let (first, second) = (AtomicBool::new(false), AtomicBool::new(false));
    let wait = |met: &AtomicBool| {
        while !met.load(Ordering::Acquire) {
            std::thread::yield_now()
        }
    };
    let steal = || {
        first.store(true, Ordering::Release);
        rayon::join(|| wait(&second), || second.store(true, Ordering::Release));
    };
    rayon::join(|| wait(&first), steal);
}

/// Asserts, on one thread and on two, that a loop neither allocates nor maps memory after the first steps.
fn assert_steady(what: &str, steps: usize, run: impl Fn(&mut Steps) -> Result<()> + Sync) {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    for threads in [1, 2] {
        let number = POOL.fetch_add(1, Ordering::Relaxed) + 1;
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).start_handler(move |_| MEMBER_OF.set(number));
        let mut counts = Steps { next: 0, last: WARM_UP + steps, allocations: 0, faults: 0 };
        let pool = pool.build().unwrap();
        pool.install(|| (1..threads).for_each(|_| steal_once()));
        pool.install(|| run(&mut counts)).unwrap();
        let Steps { allocations, faults, .. } = counts;
        println!("{what}: {allocations} allocations, {faults} page faults in {steps} steps on {threads} threads");
        assert_eq!(allocations, 0, "{what}: allocations in {steps} steps on {threads} threads");
        assert!(faults < steps, "{what}: {faults} page faults in {steps} steps on {threads} threads");
    }
}

fn numbers<E: Float>(len: usize) -> Vec<E> {
    let mut rng = Rng::new(len as u64);
    (0..len).map(|_| E::from_f32(rng.uniform(-1.0, 1.0) as f32)).collect()
}

/// Training steps of a model, with inputs from the host and the loss read back.
fn train<E: Float>(steps: &mut Steps, sizes: &[usize], batch: usize, config: Option<&LoraConfig>) -> Result<()> {
    let (cpu, rng) = (Cpu::<E>::new()?, &mut Rng::new(1));
    let (inputs, classes) = (sizes[0], sizes[sizes.len() - 1]);
    let mut model = Mlp::new(&cpu, sizes, rng)?;
    config.map_or(Ok(()), |config| model.add_adapters(&cpu, Targets::All, config, rng))?;
    let labels: Vec<u32> = (0..batch).map(|i| (i % classes) as u32).collect();
    let (images, mut adam, mut loss) = (numbers::<E>(batch * inputs), Adam::new(1e-3)?, [0.0]);
    let mut gradients = Gradients::default();
    for (seed, ()) in steps.enumerate() {
        let mut tape = Tape::reusing(&cpu, gradients);
        let x = tape.input(Tensor::from_slice(&cpu, (batch, inputs), &images)?);
        let logits = model.forward(&mut tape, x, Some(seed as u64))?;
        let labels = Labels::new(&cpu, classes, &labels)?;
        tape.cross_entropy(logits, &labels)?.copy_to_slice(&cpu, &mut loss)?;
        gradients = tape.backward()?;
        if config.is_some() {
            gradients.clip(&cpu, 1e-4)?; // below the norm of every step
        }
        adam.step(&cpu, model.params_mut(), &gradients)?;
    }
    Ok(())
}

const SIZES: [usize; 4] = [300, 200, 70, 10];

#[test]
fn a_training_step_of_adapters_allocates_nothing() {
    let plain = LoraConfig::new(4, 8.0);
    let all = LoraConfig { dropout: 0.1, lora_bias: true, bias: Bias::All, ..plain.clone() };
    let dora = LoraConfig { use_dora: true, ..plain.clone() };
    for batch in [1, 10, 40] {
        assert_steady("adapters", 50, |steps| train::<f32>(steps, &SIZES, batch, Some(&plain)));
        assert_steady("with biases and dropout", 50, |steps| train::<f32>(steps, &SIZES, batch, Some(&all)));
    }
    assert_steady("with biases and dropout, bf16", 50, |steps| train::<bf16>(steps, &SIZES, 40, Some(&all)));
    assert_steady("DoRA", 50, |steps| train::<f32>(steps, &SIZES, 10, Some(&dora)));
}

#[test]
fn a_training_step_of_the_base_model_allocates_nothing() {
    for batch in [1, 10, 40, 100] {
        assert_steady("base", 50, |steps| train::<f32>(steps, &SIZES, batch, None));
    }
    assert_steady("base, bf16", 50, |steps| train::<bf16>(steps, &SIZES, 40, None));
}

/// Weights, activations and gradients that are large enough to be mapped directly.
#[test]
fn large_tensors_are_not_mapped_anew() {
    let (sizes, adapters) = ([1030, 1100, 16], LoraConfig::new(8, 8.0));
    assert_steady("large, adapters", 8, |steps| train::<f32>(steps, &sizes, 1050, Some(&adapters)));
    assert_steady("large, base", 8, |steps| train::<f32>(steps, &sizes, 1050, None));
}

/// One token at a time through layers with two adapters; each output is the next input.
fn decode<E: Float>(steps: &mut Steps) -> Result<()> {
    let (cpu, rng) = (Cpu::<E>::new()?, &mut Rng::new(2));
    let mut model = Mlp::new(&cpu, &[256, 300, 256], rng)?;
    model.add_adapter(&cpu, "one", Targets::All, &LoraConfig::new(4, 8.0), rng)?;
    model.add_adapter(&cpu, "two", Targets::All, &LoraConfig::new(16, 8.0), rng)?;
    model.set_active(&["one", "two"])?;
    let (mut tape, mut token) = (Tape::new(&cpu), numbers::<E>(256));
    for () in steps {
        let x = tape.input(Tensor::from_slice(&cpu, (1, 256), &token)?);
        let y = model.forward(&mut tape, x, None)?;
        tape.value(y)?.copy_to_slice(&cpu, &mut token)?;
        tape.reset();
    }
    Ok(())
}

#[test]
fn decoding_allocates_nothing() {
    assert_steady("decoding", 200, decode::<f32>);
    assert_steady("decoding, bf16", 200, decode::<bf16>);
}

/// Merges and unmerges an update.
fn merge<E: Float>(steps: &mut Steps, (n, k, r): (usize, usize, usize), rounding: Rounding) -> Result<()> {
    let cpu = Cpu::<E>::new()?;
    let tensor = |rows, cols| Tensor::from_slice(&cpu, (rows, cols), &numbers::<E>(rows * cols));
    let (a, b, mut w) = (tensor(r, k)?, tensor(n, r)?, tensor(n, k)?);
    for () in steps {
        for scale in [0.5, -0.5] {
            op::LoraMerge { a: (&a).into(), b: (&b).into(), scale, rounding, w: w.view_mut() }.run(&cpu)?;
        }
    }
    Ok(())
}

#[test]
fn merging_allocates_nothing() {
    let stochastic = Rounding::Stochastic { seed: 1 };
    for size in [(200, 300, 4), (300, 200, 100), (1100, 1030, 16)] {
        assert_steady("merging", 20, |steps| merge::<f32>(steps, size, Rounding::Nearest));
        assert_steady("merging, bf16", 20, |steps| merge::<bf16>(steps, size, Rounding::Nearest));
        assert_steady("merging by chance, bf16", 20, |steps| merge::<bf16>(steps, size, stochastic));
    }
}

/// Every verb, on tensors of the caller's.
fn verbs<E: Float>(steps: &mut Steps, (m, k, n, r): (usize, usize, usize, usize)) -> Result<()> {
    let cpu = &Cpu::<E>::new()?;
    let tensor = |rows, cols| Tensor::from_slice(cpu, (rows, cols), &numbers::<E>(rows * cols));
    let wide = |rows, cols| Tensor::from_slice(cpu, (rows, cols), &numbers::<f32>(rows * cols));
    let (x, dy, a, b, bias) = (&tensor(m, k)?, &tensor(m, n)?, &tensor(r, k)?, &tensor(n, r)?, &tensor(1, n)?);
    let (mut w, mut y, mut dx) = (tensor(n, k)?, tensor(m, n)?, tensor(m, k)?);
    let (mut h, mut da, mut db, mut dbias) = (wide(m, r)?, wide(r, k)?, wide(n, r)?, wide(1, n)?);
    let (mut dw, mut first, mut second) = (wide(n, k)?, Tensor::zeros(cpu, (n, k))?, Tensor::zeros(cpu, (n, k))?);
    let mut master = wide(n, k)?;
    let (mut norm, mut dmagnitude, mut loss) = (wide(1, n)?, wide(1, n)?, wide(1, 1)?);
    let labels = &Labels::new(cpu, n, &(0..m).map(|i| (i % n) as u32).collect::<Vec<_>>())?;
    let (rate, dropout) = (AdamRate::new(1e-3, 0.9, 0.999, 1e-8, 1)?, Dropout::new(0.5, 1)?);
    for () in steps {
        for (base, dropout) in [(true, None), (true, Some(dropout)), (false, None), (false, Some(dropout))] {
            let (w, bias, scale) = (base.then_some(&w), base.then_some(bias), 0.5);
            op::LoraForward {
                x: x.view(),
                w: w.map(Into::into),
                bias: bias.map(Tensor::view),
                a: a.into(),
                b: b.into(),
                scale,
                dropout,
                h: h.view_mut(),
                y: (&mut y).into(),
            }
            .run(cpu)?;
            let (da, db, dbias, dx) = (&mut da, &mut db, Some(&mut dbias), Some(&mut dx));
            op::LoraBackward {
                x: x.view(),
                w: w.map(Into::into),
                a: a.into(),
                b: b.into(),
                h: h.view(),
                dy: dy.view(),
                scale,
                dropout,
                da: da.view_mut(),
                db: db.view_mut(),
                dbias: dbias.map(Tensor::view_mut),
                dx: dx.map(Into::into),
            }
            .run(cpu)?;
        }
        op::LinearForward { x: x.view(), w: (&w).into(), bias: Some(bias.view()), y: (&mut y).into() }.run(cpu)?;
        let (dw_, dbias, dx) = (Some(&mut dw), Some(&mut dbias), Some(&mut dx));
        op::LinearBackward {
            x: Some(x.view()),
            w: Some((&w).into()),
            dy: dy.view(),
            dx: dx.map(Into::into),
            dw: dw_.map(Tensor::view_mut),
            dbias: dbias.map(Tensor::view_mut),
        }
        .run(cpu)?;
        op::LoraRowNorm { w: (&w).into(), a: a.into(), b: b.into(), scale: 0.5, norm: norm.view_mut() }.run(cpu)?;
        op::Magnitude { z: dy.view(), magnitude: bias.view(), norm: norm.view(), bias: Some(bias.view()), y: y.view_mut() }
            .run(cpu)?;
        let (dz, dmagnitude) = (Some(&mut y), Some(&mut dmagnitude));
        op::MagnitudeBackward {
            z: dy.view(),
            magnitude: bias.view(),
            norm: norm.view(),
            dy: dy.view(),
            dz: dz.map(Tensor::view_mut),
            dmagnitude: dmagnitude.map(Tensor::view_mut),
            dbias: None,
        }
        .run(cpu)?;
        op::Relu { x: dy.view(), y: y.view_mut() }.run(cpu)?;
        op::ReluBackward { y: dy.view(), dy: dy.view(), dx: y.view_mut() }.run(cpu)?;
        op::DropoutForward { x: dy.view(), dropout, y: y.view_mut() }.run(cpu)?;
        op::Add { x: dy.view(), scale: 1.0, y: y.view_mut() }.run(cpu)?;
        op::CrossEntropy { logits: dy.view(), labels, loss: loss.view_mut(), dlogits: y.view_mut() }.run(cpu)?;
        for grad in [WeightGrad::Factored { dy, x }, WeightGrad::Dense(&dw)] {
            op::Adam { grad, rate, m: &mut first, v: &mut second, master: None, w: &mut w }.run(cpu)?;
        }
        for grad in [WeightGrad::Factored { dy, x }, WeightGrad::Dense(&dw)] {
            op::Adam { grad, rate, m: &mut first, v: &mut second, master: Some(&mut master), w: &mut w }.run(cpu)?;
        }
        op::Accumulate { x: second.view(), scale: 0.5, y: dw.view_mut() }.run(cpu)?;
    }
    Ok(())
}

#[test]
fn verbs_allocate_nothing() {
    for m in [1, 10, 40, 100] {
        assert_steady("verbs", 20, |steps| verbs::<f32>(steps, (m, 90, 130, 4)));
        assert_steady("verbs, bf16", 20, |steps| verbs::<bf16>(steps, (m, 90, 130, 4)));
    }
    assert_steady("large verbs", 6, |steps| verbs::<f32>(steps, (1050, 1030, 1100, 16)));
}

/// Three projections fused in one weight, with their outputs side by side, all in vectors of the caller.
fn lent<E: Float>(steps: &mut Steps, (m, k, n, r): (usize, usize, usize, usize)) -> Result<()> {
    let cpu = &Cpu::<E>::new()?;
    let (x, w, a, b) = (numbers::<E>(m * k), numbers::<E>(3 * n * k), numbers::<f32>(r * k), numbers::<f32>(n * r));
    let (mut h, mut y, mut dx) = (numbers::<f32>(m * r), numbers::<E>(m * 3 * n), numbers::<E>(m * k));
    let (mut da, mut db) = (numbers::<f32>(r * k), numbers::<f32>(n * r));
    let (a, b) = (op::Factor::F32(MatRef::from_slice(&a, (r, k))?), op::Factor::F32(MatRef::from_slice(&b, (n, r))?));
    let (x, scale, dropout) = (MatRef::from_slice(&x, (m, k))?, 0.5, None);
    for () in steps {
        for layer in 0..3 {
            let cols = layer * n..(layer + 1) * n;
            let w: op::Weight<_> = MatRef::from_slice(&w, (3 * n, k))?.row_range(cols.clone())?.into();
            let (h_, y_) =
                (MatMut::from_slice(&mut h, (m, r))?, MatMut::from_slice(&mut y, (m, 3 * n))?.column_range(cols.clone())?);
            op::LoraForward { x, w: Some(w), bias: None, a, b, scale, dropout, h: h_, y: y_.into() }.run(cpu)?;
            let (h, dy) = (MatRef::from_slice(&h, (m, r))?, MatRef::from_slice(&y, (m, 3 * n))?.column_range(cols)?);
            let (da, db) = (MatMut::from_slice(&mut da, (r, k))?, MatMut::from_slice(&mut db, (n, r))?);
            let dx = Some(op::Output::AddTo(MatMut::from_slice(&mut dx, (m, k))?));
            op::LoraBackward { x, w: Some(w), a, b, h, dy, scale, dropout, da, db, dbias: None, dx }.run(cpu)?;
        }
    }
    Ok(())
}

#[test]
fn lent_memory_is_neither_copied_nor_allocated() {
    for sizes in [(1, 300, 257, 4), (40, 300, 257, 4), (130, 200, 70, 33)] {
        assert_steady("lent", 50, |steps| lent::<f32>(steps, sizes));
        assert_steady("lent, bf16", 50, |steps| lent::<bf16>(steps, sizes));
    }
}

/// The first step allocates less than the size of a weight, so the weight is not copied.
#[test]
fn the_first_use_of_a_lent_weight_copies_nothing() {
    let (m, k, n) = (4, 1024, 1024);
    let (x, w, mut y) = (vec![1f32; m * k], vec![1f32; n * k], vec![0f32; m * n]);
    let cpu = Cpu::<f32>::new().unwrap();
    let faults = page_faults();
    let (x, w) = (MatRef::from_slice(&x, (m, k)).unwrap(), MatRef::from_slice(&w, (n, k)).unwrap());
    op::LinearForward { x, w: w.into(), bias: None, y: MatMut::from_slice(&mut y, (m, n)).unwrap().into() }.run(&cpu).unwrap();
    let (pages, weight) = (page_faults() - faults, n * k * size_of::<f32>() / 4096);
    assert!(pages < weight / 2, "{pages} pages were touched for the first time; the weight has {weight}");
    assert!(y.iter().all(|&y| y == k as f32));
}
