//! Threads that share one backend: its pool of memory, and outputs of which each thread writes a part. The bits are those of one
//! thread alone, whatever the others do. `scripts/sanitize threads` runs it under ThreadSanitizer.

mod support;

use std::sync::Barrier;

use lowrank::op::{LoraMerge, Rounding};
use lowrank::random::Rng;
use lowrank::{Cpu, Float, Tensor, bf16};
use support::data::{Dims, random, up};
use support::suite;

/// Rounds of each thread.
const ROUNDS: usize = if cfg!(debug_assertions) { 20 } else { 200 };
/// Few rows, many rows, odd sides, and a batch that several tasks share.
const SHAPES: [Dims; 5] = [
    Dims { m: 1, k: 300, n: 70, r: 4 },
    Dims { m: 9, k: 64, n: 129, r: 1 },
    Dims { m: 33, k: 40, n: 65, r: 8 },
    Dims { m: 70, k: 130, n: 150, r: 3 },
    Dims { m: 128, k: 96, n: 192, r: 16 },
];

/// The bits of a layer's forward and backward pass, and of its merged weight.
fn bits<E: Float>(cpu: &Cpu<E>, dims: Dims, seed: u64) -> Vec<u32> {
    let layer = random::<E>(dims, 0.5, seed);
    let mut bits = suite::run_lora(cpu, &layer, None).bits();
    let [mut w, a, b] = [&layer.w, &layer.a, &layer.b].map(|mat| up::<_, E>(cpu, mat));
    LoraMerge { a: (&a).into(), b: (&b).into(), scale: 0.5, rounding: Rounding::Nearest, w: w.view_mut() }.run(cpu).unwrap();
    bits.extend(w.to_vec(cpu).unwrap().into_iter().map(|x| x.to_f32().to_bits()));
    bits
}

/// Callers on threads of their own, over a pool of workers that they share.
fn all_at_once<E: Float>(workers: usize) {
    const CALLERS: usize = 4;
    let alone = Cpu::<E>::new().unwrap().with_threads(1).unwrap();
    let want: Vec<Vec<u32>> = SHAPES.iter().map(|&dims| bits(&alone, dims, 1)).collect();
    let (shared, start) = (Cpu::<E>::new().unwrap().with_threads(workers).unwrap(), Barrier::new(CALLERS));
    std::thread::scope(|scope| {
        for caller in 0..CALLERS {
            let (shared, start, want) = (&shared, &start, &want);
            scope.spawn(move || {
                let mut rng = Rng::new(caller as u64);
                start.wait();
                for _ in 0..ROUNDS {
                    let at = rng.below(SHAPES.len());
                    assert!(bits(shared, SHAPES[at], 1) == want[at], "{:?} on {workers} workers", SHAPES[at]);
                    // Memory of a caller that another may be given next.
                    let len = 1 + rng.below(5000);
                    let mine = Tensor::from_slice(shared, (1, len), &vec![E::from_f32(caller as f32); len]).unwrap();
                    let there = mine.to_vec(shared).unwrap();
                    assert!(there.iter().all(|x| x.to_f32() == caller as f32), "memory was given to two callers");
                }
            });
        }
    });
}

#[test]
fn callers_do_not_disturb_one_another() {
    for workers in [1, 2, 3, 8] {
        all_at_once::<f32>(workers);
        all_at_once::<bf16>(workers);
    }
}
