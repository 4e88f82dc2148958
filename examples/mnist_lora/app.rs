//! Opening the backend, and running the experiment on it.

#[cfg(not(all(feature = "webgpu", feature = "cuda")))]
use lowrank::Error;
use lowrank::distributed::Communicator;
use lowrank::{Backend, Cpu, Result};

use crate::args::{Args, Device};
use crate::experiment::{self, Settings};
use crate::mnist::{self, Mnist};
use crate::progress::Watch;
use crate::train::Checkpoints;
use crate::{chart, data, report, whole};

/// Opens the backend before the data is downloaded, so that a missing backend is reported at once.
pub fn run<C: Communicator>(args: &Args, comm: &C) -> Result<()> {
    whole::guard_against_ctrl_c()?;
    match args.backend {
        Device::Auto => best(args, comm),
        Device::Cpu => show(&cpu(args)?, args, comm),
        #[cfg(feature = "webgpu")]
        Device::Webgpu => show(&lowrank::WebGpu::<f32>::new()?, args, comm),
        #[cfg(not(feature = "webgpu"))]
        Device::Webgpu => Err(not_compiled("webgpu")),
        #[cfg(feature = "cuda")]
        Device::Cuda => show(&lowrank::Cuda::<f32>::new(0)?, args, comm),
        #[cfg(not(feature = "cuda"))]
        Device::Cuda => Err(not_compiled("cuda")),
    }
}

/// An NVIDIA GPU if there is one and this build can use it, else the CPU.
fn best<C: Communicator>(args: &Args, comm: &C) -> Result<()> {
    #[cfg(feature = "cuda")]
    if let Ok(gpu) = lowrank::Cuda::<f32>::new(0) {
        return show(&gpu, args, comm);
    }
    show(&cpu(args)?, args, comm)
}

fn cpu(args: &Args) -> Result<Cpu<f32>> {
    let cpu = Cpu::new()?;
    args.threads.map_or(Ok(cpu.clone()), |threads| cpu.with_threads(threads))
}

#[cfg(not(all(feature = "webgpu", feature = "cuda")))]
fn not_compiled(backend: &'static str) -> Error {
    let reason = format!("not compiled in; run again with `cargo run --release --features {backend} --example mnist_lora`");
    Error::Unavailable { backend, reason }
}

/// Runs the experiment. Rank 0 reads the data, shows and writes the results; the others are silent.
fn show<B: Backend, C: Communicator>(backend: &B, args: &Args, comm: &C) -> Result<()> {
    let (mnist, source) = data::find_on_rank_0(args, comm)?;
    let first = comm.rank() == 0;
    if first {
        report::begin(&backend.device(), comm.size(), &source, &mnist);
    }
    let (mut watch, adapter) = (Watch::new(), args.out.join("adapter"));
    let mut show = |at: &experiment::Progress| {
        if first {
            watch.show(at)
        }
    };
    let Some(outcome) = experiment::run((backend, comm), &mnist, &settings(args), &adapter, &mut show)? else { return Ok(()) };

    report::tables(&outcome, &digit_counts(&mnist));
    whole::write(&args.out.join("errors.svg"), chart::errors(&outcome)?.as_bytes())?;
    whole::write(&args.out.join("loss.svg"), chart::losses(&outcome)?.as_bytes())?;
    println!("\nadapter, errors.svg and loss.svg are in {}", args.out.display());
    if let Some(path) = &args.json {
        let figures = report::json(&outcome, args, &backend.device(), &source);
        whole::write(path, format!("{figures:#}\n").as_bytes())?;
        println!("every figure is in {}", path.display());
    }
    report::verdict(&outcome)
}

/// The settings. The network is oversized on purpose, to show how small an update can be.
fn settings(args: &Args) -> Settings {
    let Args { seed, rank, alpha, lr, batches, digit, epochs, quantise, .. } = *args;
    let (every, resume) = (args.checkpoint_every as usize, args.resume);
    let checkpoints = args.checkpoint.clone().map(|dir| Checkpoints { dir, every, resume });
    Settings { seed, hidden: vec![1000, 2000], epochs, batch: 10, lr, rank, alpha, batches, digit, quantise, checkpoints }
}

/// The number of test images of each digit.
fn digit_counts(mnist: &Mnist) -> [usize; mnist::DIGITS] {
    std::array::from_fn(|digit| mnist.test.of_digit(digit as u8).len())
}
