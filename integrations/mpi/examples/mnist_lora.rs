//! `examples/mnist_lora` of lowrank on all processes that `mpirun` started.
//!
//! ```sh
//! cargo build --release --example mnist_lora
//! mpirun -n 2 target/release/examples/mnist_lora --distributed mpi
//! ```

#![allow(unreachable_pub, reason = "an example exports nothing")]

#[path = "../../../examples/mnist_lora/app.rs"]
mod app;
#[path = "../../../examples/mnist_lora/args.rs"]
mod args;
#[path = "../../../examples/mnist_lora/chart.rs"]
mod chart;
#[path = "../../../examples/mnist_lora/data.rs"]
mod data;
#[path = "../../../examples/mnist_lora/experiment.rs"]
mod experiment;
#[allow(dead_code, unused_imports, reason = "tests of lowrank use all of it")]
#[path = "../../../examples/mnist_lora/mnist/mod.rs"]
mod mnist;
#[path = "../../../examples/mnist_lora/progress.rs"]
mod progress;
#[path = "../../../examples/mnist_lora/report.rs"]
mod report;
#[path = "../../../examples/mnist_lora/train.rs"]
mod train;
#[path = "../../../examples/mnist_lora/whole.rs"]
mod whole;

use std::process::ExitCode;

use clap::Parser;
use lowrank::distributed::SingleProcess;

use args::{Args, Engine};

fn main() -> ExitCode {
    let args = Args::parse();
    match args.distributed {
        Engine::Mpi => lowrank_mpi::run(|mpi| app::run(&args, mpi)),
        Engine::None if lowrank_mpi::started_with().is_some_and(|ranks| ranks > 1) => {
            fail("`mpirun` started several processes; `--distributed mpi` lets them train together")
        }
        Engine::None => match app::run(&args, &SingleProcess) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error.to_string()),
        },
    }
}

fn fail(message: &str) -> ExitCode {
    eprintln!("error: {message}");
    ExitCode::FAILURE
}
