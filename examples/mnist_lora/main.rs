//! LoRA from start to end: trains a network on MNIST, finds the digit with the most errors, trains adapters of rank 1 on that
//! digit, and shows that the base model has not changed.
//!
//! ```text
//! args.rs        the flags
//! data.rs        finding MNIST: a folder, the cache, a mirror, or generated digits
//! mnist/         readers of IDX files, and generated digits
//! experiment.rs  training, freezing, adapting, scoring: the part to read
//! train.rs       the training loop: one process or several, with checkpoints
//! app.rs         opening the backend, and running the experiment on it
//! progress.rs    progress bars    report.rs  tables and JSON
//! chart.rs       SVG              whole.rs   files written completely or not at all
//! ```

#![allow(unreachable_pub, reason = "an example exports nothing")]

mod app;
mod args;
mod chart;
mod data;
mod experiment;
#[allow(dead_code, unused_imports, reason = "tests/mnist.rs and the fuzz targets use all of it")]
mod mnist;
mod progress;
mod report;
mod train;
mod whole;

use std::process::ExitCode;

use clap::Parser;
use lowrank::distributed::SingleProcess;
use lowrank::{Error, Result};

use args::{Args, Engine};

fn main() -> ExitCode {
    match start(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn start(args: &Args) -> Result<()> {
    match args.distributed {
        Engine::None => app::run(args, &SingleProcess),
        Engine::Mpi => {
            let reason = "this program was built without it; the one in `integrations/mpi` has it: \
                          `cargo build --release --manifest-path integrations/mpi/Cargo.toml --example mnist_lora`";
            Err(Error::Unavailable { backend: "mpi", reason: reason.into() })
        }
    }
}
