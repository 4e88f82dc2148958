//! `cargo run --release -p rivals`: lowrank's verbs beside the same verbs composed of other crates' products.
//!
//! Everyone gets the same inputs in the same memory, is first checked against the tests' oracle, and is then timed in interleaved
//! runs; the machine's peaks are measured in the same run. `benches/RESULTS.md` keeps what was measured. `rivals/burn` and
//! `rivals/candle` are programs of their own, and benches/rivals/ has the rivals in Python; all write the same rows.

use std::error::Error;

use clap::{Parser, ValueEnum};
#[cfg(feature = "webgpu")]
use lowrank::{Backend, WebGpu};
use lowrank::{Cpu, Float, Result, bf16, f16};

use rivals::options::{Dtype, Options};
use rivals::peaks::Peaks;
use rivals::race::race;
use rivals::rivals::Products;
#[cfg(feature = "webgpu")]
use rivals::rivals::Shaders;
use rivals::table::{Report, print_peaks};

/// lowrank's verbs beside the same verbs composed of other crates' products.
#[derive(Parser)]
#[command(version = None)]
struct Args {
    /// Where; a GPU needs the feature of its name
    #[arg(long, value_name = "B", default_value = "cpu")]
    backend: On,
    /// These numbers of threads instead of one and all
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..), value_delimiter = ',')]
    threads: Vec<u16>,
    #[command(flatten)]
    options: Options,
}

#[derive(Clone, Copy, Default, ValueEnum)]
enum On {
    #[default]
    Cpu,
    #[cfg(feature = "webgpu")]
    Webgpu,
}

fn main() -> std::result::Result<(), Box<dyn Error>> {
    let Args { backend, threads, options } = Args::parse();
    match backend {
        On::Cpu => cpu(&options, threads),
        #[cfg(feature = "webgpu")]
        On::Webgpu => webgpu(&options),
    }
}

/// On each number of threads.
fn cpu(options: &Options, mut threads: Vec<u16>) -> std::result::Result<(), Box<dyn Error>> {
    fn on<E: Float>(peaks: &[Peaks]) -> Result<Vec<(Cpu<E>, Peaks)>> {
        let with = |peaks: &Peaks| Ok((Cpu::new()?.with_threads(peaks.threads.unwrap_or(1))?, *peaks));
        peaks.iter().map(with).collect()
    }
    if threads.is_empty() {
        let all = std::thread::available_parallelism().map_or(1, |n| n.get() as u16);
        threads = if all > 1 { vec![1, all] } else { vec![1] };
    }
    println!("{}", Cpu::<f32>::new()?.unit().name());
    let peaks: Vec<Peaks> = threads.iter().map(|&threads| Peaks::measure(threads.into())).collect();
    peaks.iter().for_each(print_peaks);
    let mut report = Report::new(options, &Products::NAMES, "")?;
    for dtype in options.dtypes() {
        match dtype {
            Dtype::F32 => race(options, &Products, on::<f32>(&peaks)?, &mut report)?,
            Dtype::Bf16 => race(options, &Products, on::<bf16>(&peaks)?, &mut report)?,
            Dtype::F16 => race(options, &Products, on::<f16>(&peaks)?, &mut report)?,
        }
    }
    report.finish()
}

/// On the best adapter, or the one that `LOWRANK_ADAPTER` names.
#[cfg(feature = "webgpu")]
fn webgpu(options: &Options) -> std::result::Result<(), Box<dyn Error>> {
    let gpu = WebGpu::<f32>::new()?;
    println!("{}", gpu.device());
    let peaks = Peaks::of_device(&gpu)?;
    print_peaks(&peaks);
    let mut report = Report::new(options, &Shaders::NAMES, "naive: a shader with a thread an output")?;
    for dtype in options.dtypes() {
        match dtype {
            Dtype::F32 => race(options, &Shaders, vec![(gpu.clone(), peaks)], &mut report)?,
            Dtype::Bf16 => {} // WGSL has no bf16
            Dtype::F16 => match WebGpu::<f16>::from_device(gpu.wgpu_device().clone(), gpu.wgpu_queue().clone()) {
                Ok(gpu) => race(options, &Shaders, vec![(gpu, peaks)], &mut report)?,
                Err(error) => println!("not measured: {error}"),
            },
        }
    }
    report.finish()
}
