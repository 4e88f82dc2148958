//! lowrank's verbs on the CPU beside the same layer written by hand in candle.
//!
//! `RAYON_NUM_THREADS=N cargo run --release --manifest-path rivals/candle/Cargo.toml -- [--quick] [--json FILE]`, and the other
//! flags of `rivals`. candle asks that variable how many threads there are, once a process; lowrank gets as many.

mod candle;

use std::error::Error;

use candle_core::utils::get_num_threads;
use clap::Parser;
use lowrank::{Cpu, bf16, f16};
use rivals::options::{Dtype, Options};
use rivals::peaks::Peaks;
use rivals::race::race;
use rivals::table::{Report, print_peaks};

use candle::Candle;

/// lowrank's verbs on the CPU beside the same layer written by hand in candle.
#[derive(Parser)]
#[command(version = None)]
struct Args {
    #[command(flatten)]
    options: Options,
}

fn main() -> Result<(), Box<dyn Error>> {
    let Args { options } = Args::parse();
    let threads = get_num_threads();
    println!("{}", Cpu::<f32>::new()?.unit().name());
    let peaks = Peaks::measure(threads);
    print_peaks(&peaks);
    let legend = "candle: its own tensors, outputs allocated at every run; backward is its autograd, which makes the frozen \
                  weight's gradient too";
    let mut report = Report::new(&options, &Candle::NAMES, legend)?;
    for dtype in options.dtypes() {
        match dtype {
            Dtype::F32 => race(&options, &Candle, vec![(Cpu::<f32>::new()?.with_threads(threads)?, peaks)], &mut report)?,
            Dtype::Bf16 => race(&options, &Candle, vec![(Cpu::<bf16>::new()?.with_threads(threads)?, peaks)], &mut report)?,
            Dtype::F16 => race(&options, &Candle, vec![(Cpu::<f16>::new()?.with_threads(threads)?, peaks)], &mut report)?,
        }
    }
    report.finish()
}
