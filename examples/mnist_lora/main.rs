//! LoRA from start to end: trains a network on MNIST, finds the digit with the most errors, trains adapters of rank 1 on that digit, and
//! shows that the base model has not changed.
//!
//! ```text
//! args.rs        the flags
//! data.rs        finding MNIST: a folder, the cache, a mirror, or generated digits
//! mnist/         readers of IDX files, and generated digits
//! experiment.rs  training, freezing, adapting, scoring: the part to read
//! progress.rs    progress bars    report.rs  tables and JSON
//! chart.rs       SVG              whole.rs   files written completely or not at all
//! ```

#![allow(unreachable_pub, reason = "an example exports nothing")]

mod args;
mod chart;
mod data;
mod experiment;
#[allow(dead_code, unused_imports, reason = "tests/mnist.rs and the fuzz targets use all of it")]
mod mnist;
mod progress;
mod report;
mod whole;

use std::process::ExitCode;

use clap::Parser;
#[cfg(not(all(feature = "webgpu", feature = "cuda")))]
use lowrank::Error;
use lowrank::{Backend, Cpu, Result};
use mnist::Mnist;

use args::{Args, Device};
use experiment::Settings;
use progress::Watch;

fn main() -> ExitCode {
    match start(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Opens the backend before the data is downloaded, so that a missing backend is reported at once.
fn start(args: &Args) -> Result<()> {
    whole::guard_against_ctrl_c()?;
    match args.backend {
        Device::Auto => best(args),
        Device::Cpu => show(&cpu(args)?, args),
        #[cfg(feature = "webgpu")]
        Device::Webgpu => show(&lowrank::WebGpu::<f32>::new()?, args),
        #[cfg(not(feature = "webgpu"))]
        Device::Webgpu => Err(not_compiled("webgpu")),
        #[cfg(feature = "cuda")]
        Device::Cuda => show(&lowrank::Cuda::<f32>::new(0)?, args),
        #[cfg(not(feature = "cuda"))]
        Device::Cuda => Err(not_compiled("cuda")),
    }
}

/// An NVIDIA GPU if there is one and this build can use it, else the CPU.
fn best(args: &Args) -> Result<()> {
    #[cfg(feature = "cuda")]
    if let Ok(gpu) = lowrank::Cuda::<f32>::new(0) {
        return show(&gpu, args);
    }
    show(&cpu(args)?, args)
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

/// Runs the experiment and shows the results.
fn show<B: Backend>(backend: &B, args: &Args) -> Result<()> {
    let (mnist, source) = data::find(args)?;
    report::begin(&backend.device(), &source, &mnist);
    let mut watch = Watch::new();
    let adapter = args.out.join("adapter");
    let outcome = experiment::run(backend, &mnist, &settings(args), &adapter, &mut |at| watch.show(at))?;

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
    let Args { seed, rank, alpha, lr, batches, digit, epochs, .. } = *args;
    Settings { seed, hidden: vec![1000, 2000], epochs, batch: 10, lr, rank, alpha, batches, digit }
}

/// The number of test images of each digit.
fn digit_counts(mnist: &Mnist) -> [usize; mnist::DIGITS] {
    std::array::from_fn(|digit| mnist.test.of_digit(digit as u8).len())
}
