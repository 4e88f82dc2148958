//! The crate starts no threads that the caller did not ask for. Linux reports the number of threads of a process.
#![cfg(target_os = "linux")]

mod support;

use lowrank::op::*;
use lowrank::{Cpu, Float, Tensor, bf16};

use support::data::{Dims, down, random, unwritten, up};
use support::suite;

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

/// All output bits of the verbs that may run sequentially, at this shape: both passes of the layer and of its base, merging, norms, Adam,
/// and the elementwise verbs.
fn every_verb<E: Float>(cpu: &Cpu<E>, dims: Dims) -> Vec<u32> {
    let (Dims { m, k, n, .. }, layer) = (dims, random::<E>(dims, 0.5, 7));
    let mut bits = suite::run_lora(cpu, &layer, None).bits();
    let (y, dx, dw, dbias) = suite::run_linear(cpu, &layer);
    let [x, mut w, a, b, dy] = [&layer.x, &layer.w, &layer.a, &layer.b, &layer.dy].map(|mat| up::<_, E>(cpu, mat));
    let mut norm: Tensor<_, f32> = unwritten(cpu, 1, n);
    LoraRowNorm { w: (&w).into(), a: (&a).into(), b: (&b).into(), scale: 0.5, norm: norm.view_mut() }.run(cpu).unwrap();
    let (magnitude, mut scaled) = (up(cpu, layer.bias.as_ref().unwrap()), unwritten(cpu, m, n));
    Magnitude { z: dy.view(), magnitude: magnitude.view(), norm: norm.view(), bias: None, y: scaled.view_mut() }
        .run(cpu)
        .unwrap();
    let mut gated = unwritten(cpu, m, k);
    ReluBackward { y: x.view(), dy: x.view(), dx: gated.view_mut() }.run(cpu).unwrap();
    Add { x: x.view(), y: gated.view_mut() }.run(cpu).unwrap();
    LoraMerge { a: (&a).into(), b: (&b).into(), scale: 0.5, rounding: Rounding::Nearest, w: w.view_mut() }.run(cpu).unwrap();
    let (mut first, mut second) = (up(cpu, &layer.w), up(cpu, &layer.w.abs()));
    let (mut master, rate) = (up(cpu, &layer.w), AdamRate::adamw(0.1, 0.9, 0.99, 1e-8, 0.01, 1).unwrap());
    for with_master in [false, true] {
        let (grad, master) = (WeightGrad::Factored { dy: &dy, x: &x }, with_master.then_some(&mut master));
        Adam { grad, rate, m: &mut first, v: &mut second, master, w: &mut w }.run(cpu).unwrap();
    }
    let stored = [y, dx, down(cpu, &scaled), down(cpu, &gated), down(cpu, &w)].concat();
    bits.extend(stored.into_iter().map(|x| x.to_f32().to_bits()));
    bits.extend(
        [dw, dbias, down(cpu, &norm), down(cpu, &first), down(cpu, &second), down(cpu, &master)]
            .concat()
            .into_iter()
            .map(f32::to_bits),
    );
    bits
}

/// One test, so that no other starts threads meanwhile.
#[test]
fn only_the_threads_of_the_callers_pool_are_used() {
    let before = threads();
    let little = Dims { m: 3, k: 40, n: 20, r: 2 };
    let here = every_verb(&Cpu::<f32>::new().unwrap(), little);
    assert_eq!(threads(), before, "little work starts no thread");

    let [one, two] = [1, 2].map(|threads| Cpu::<f32>::new().unwrap().with_threads(threads).unwrap());
    let half = Cpu::<bf16>::new().unwrap().with_threads(1).unwrap();
    assert_eq!(threads(), before + 4);
    assert!(here == every_verb(&one, little) && here == every_verb(&two, little));
    // Shapes around the limit where a verb, or a loop of it, is no longer sequential.
    for (m, k, n, r) in [(16, 256, 128, 4), (28, 292, 64, 4), (113, 289, 10, 1), (1, 784, 200, 4), (33, 128, 128, 32)] {
        let dims = Dims { m, k, n, r };
        assert!(every_verb(&one, dims) == every_verb(&two, dims), "{dims:?}");
        every_verb(&half, dims);
        assert_eq!(threads(), before + 4, "{dims:?}: a loop began on rayon's global threads");
    }
}
