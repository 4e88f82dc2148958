//! How long the parts of a step take on this many processes: `mpirun -n N target/release/examples/step_time`.
//!
//! The model is that of the main job, once with all weights trained and once with adapters. Medians on rank 0, in ms.

use std::process::ExitCode;
use std::time::Instant;

use lowrank::autograd::Tape;
use lowrank::distributed::{BatchShare, Communicator, shard};
use lowrank::nn::{Adam, Adaptable, LoraConfig, Mlp, Targets};
use lowrank::op::Labels;
use lowrank::random::Rng;
use lowrank::{Cpu, Result, Tensor};
use lowrank_mpi::Mpi;

const REPEATS: usize = 15;
const BATCH: usize = 10;
/// Sums of so many numbers are timed alone; the last are the gradients of adapters of rank 16 of a 7B model.
const NUMBERS: [usize; 4] = [9, 10_000, 1_000_000, 40_000_000];

fn main() -> ExitCode {
    lowrank_mpi::run(|mpi| {
        for numbers in NUMBERS {
            let mut values = vec![1.0; numbers];
            let [time] = medians(mpi, || Ok([seconds(|| mpi.all_reduce(&mut values))?]))?;
            show(mpi, &format!("all-reduce of {numbers:>8}: {time:.3}"));
        }
        for adapters in [false, true] {
            let [passes, mean, adam] = step(mpi, adapters)?;
            let what = if adapters { "adapters" } else { "all weights" };
            show(mpi, &format!("step of {what:11}: passes {passes:.1}, mean over ranks {mean:.2}, Adam {adam:.2}"));
        }
        Ok(())
    })
}

/// The passes over this rank's part of a batch, the mean of the gradients, and the optimizer.
fn step(mpi: &Mpi, adapters: bool) -> Result<[f64; 3]> {
    let (cpu, rng) = (&Cpu::<f32>::new()?.with_threads(1)?, &mut Rng::new(0));
    let (mut model, mut adam) = (Mlp::new(cpu, &[784, 1000, 2000, 10], rng)?, Adam::new(1e-3)?);
    if adapters {
        model.add_adapters(cpu, Targets::All, &LoraConfig::new(1, 1.0), rng)?;
    }
    let rows = shard(BATCH, mpi.rank(), mpi.size()).len();
    let (pixels, labels) = (vec![0.3; rows * 784], vec![1; rows]);
    medians(mpi, || {
        let (mut gradients, mut loss) = Default::default();
        let passes = seconds(|| {
            let mut tape = Tape::new(cpu);
            let x = tape.input(Tensor::from_slice(cpu, (rows, 784), &pixels)?);
            let logits = model.forward(&mut tape, x, None)?;
            loss = tape.cross_entropy(logits, &Labels::new(cpu, 10, &labels)?)?.to_vec(cpu)?[0];
            gradients = tape.backward()?;
            Ok(())
        })?;
        let share = BatchShare { rows, loss };
        let mean = seconds(|| gradients.all_reduce_mean(cpu, model.params_mut(), share, mpi).map(drop))?;
        let adam = seconds(|| adam.step(cpu, model.params_mut(), &gradients))?;
        Ok([passes, mean, adam])
    })
}

fn seconds(run: impl FnOnce() -> Result<()>) -> Result<f64> {
    let began = Instant::now();
    run()?;
    Ok(began.elapsed().as_secs_f64())
}

/// The medians of several times, in ms; all ranks begin each together.
fn medians<const N: usize>(mpi: &Mpi, mut times: impl FnMut() -> Result<[f64; N]>) -> Result<[f64; N]> {
    let mut all = Vec::new();
    for _ in 0..REPEATS {
        mpi.barrier()?;
        all.push(times()?);
    }
    Ok(std::array::from_fn(|part| {
        all.sort_by(|a, b| a[part].total_cmp(&b[part]));
        1e3 * all[REPEATS / 2][part]
    }))
}

fn show(mpi: &Mpi, line: &str) {
    if mpi.rank() == 0 {
        println!("{} ranks, {line}", mpi.size());
    }
}
