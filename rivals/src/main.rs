//! `cargo run --release -p rivals`: lowrank's verbs beside the same verbs composed of other crates' products.
//!
//! Everyone gets the same inputs in the same memory, is first checked against the tests' oracle, and is then timed in interleaved
//! runs; the machine's peaks are measured in the same run. `benches/RESULTS.md` keeps what was measured, and benches/rivals/ has
//! the rivals in Python, which write the same rows.

#[path = "../../tests/support/bounds.rs"]
#[allow(dead_code, reason = "a part of it is enough")]
mod bounds;
mod check;
mod layer;
mod measure;
#[path = "../../tests/support/oracle.rs"]
#[allow(dead_code, reason = "a part of it is enough")]
mod oracle;
mod peaks;
mod rivals;
#[path = "../../benches/shapes/mod.rs"]
mod shapes;
mod table;

use std::path::PathBuf;

use clap::{Parser, ValueEnum};
#[cfg(feature = "webgpu")]
use lowrank::WebGpu;
use lowrank::{Backend, Cpu, Float, Result, bf16, f16};

use check::Expected;
use layer::{Layer, Verb};
use measure::{Effort, medians};
use peaks::Peaks;
use rivals::{Rivals, contenders};
use shapes::{RANKS, Shape};
use table::{Beside, Row, Table};

/// lowrank's verbs beside the same verbs composed of other crates' products.
#[derive(Parser)]
#[command(version = None)]
struct Args {
    /// Where; a GPU needs the feature of its name
    #[arg(long, value_name = "B", default_value = "cpu")]
    backend: On,
    /// A few rounds instead of many: for a look, not for figures worth keeping
    #[arg(long)]
    quick: bool,
    /// Writes the rows here as well
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Rows of JSON that another program wrote on this machine, as more columns: of benches/rivals/lora_layer.py, say
    #[arg(long, value_name = "FILE")]
    beside: Vec<PathBuf>,
    /// Only these shapes of benches/shapes/shapes.csv
    #[arg(long, value_name = "NAME", value_parser = shape)]
    shape: Vec<Shape>,
    /// These ranks instead of each shape's own
    #[arg(long, value_name = "R", value_parser = clap::value_parser!(u16).range(1..))]
    rank: Vec<u16>,
    /// The ranks 1, 8, 16 and 64
    #[arg(long, conflicts_with = "rank")]
    sweep: bool,
    /// These numbers of threads instead of one and all
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Vec<u16>,
    /// Only these verbs
    #[arg(long, value_name = "V")]
    verb: Vec<Verb>,
    /// Only these element types
    #[arg(long, value_name = "T")]
    dtype: Vec<Dtype>,
}

#[derive(Clone, Copy, Default, ValueEnum)]
enum On {
    #[default]
    Cpu,
    #[cfg(feature = "webgpu")]
    Webgpu,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Dtype {
    F32,
    Bf16,
    F16,
}

fn shape(name: &str) -> std::result::Result<Shape, String> {
    let names = || Shape::all().iter().map(|shape| shape.name).collect::<Vec<_>>().join(", ");
    Shape::named(name).ok_or_else(|| format!("want one of {}", names()))
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let mut args = Args::parse();
    args.fill_in();
    let beside = Beside::read(&args.beside)?;
    let mut rows = Vec::new();
    match args.backend {
        On::Cpu => cpu(&args, &beside, &mut rows)?,
        #[cfg(feature = "webgpu")]
        On::Webgpu => webgpu(&args, &beside, &mut rows)?,
    }
    if let Some(path) = args.json {
        let rows: Vec<_> = rows.iter().map(Row::json).collect();
        std::fs::write(path, serde_json::to_string_pretty(&rows)? + "\n")?;
    }
    Ok(())
}

/// On each number of threads.
fn cpu(args: &Args, beside: &Beside, rows: &mut Vec<Row>) -> Result<()> {
    fn on<E: Float>(peaks: &[Peaks]) -> Result<Vec<(Cpu<E>, Peaks)>> {
        let with = |peaks: &Peaks| Ok((Cpu::new()?.with_threads(peaks.threads.unwrap_or(1))?, *peaks));
        peaks.iter().map(with).collect()
    }
    println!("{}", Cpu::<f32>::new()?.unit().name());
    let peaks: Vec<Peaks> = args.threads.iter().map(|&threads| Peaks::measure(threads.into())).collect();
    peaks.iter().for_each(table::print_peaks);
    let mut done = printed(beside, rows);
    for dtype in &args.dtype {
        match dtype {
            Dtype::F32 => measure(args, on::<f32>(&peaks)?, &mut done)?,
            Dtype::Bf16 => measure(args, on::<bf16>(&peaks)?, &mut done)?,
            Dtype::F16 => measure(args, on::<f16>(&peaks)?, &mut done)?,
        }
    }
    Ok(())
}

/// On the best adapter, or the one that `LOWRANK_ADAPTER` names.
#[cfg(feature = "webgpu")]
fn webgpu(args: &Args, beside: &Beside, rows: &mut Vec<Row>) -> Result<()> {
    let gpu = WebGpu::<f32>::new()?;
    println!("{}", gpu.device());
    let peaks = Peaks::of_device(&gpu)?;
    table::print_peaks(&peaks);
    let mut done = printed(beside, rows);
    for dtype in &args.dtype {
        match dtype {
            Dtype::F32 => measure(args, vec![(gpu.clone(), peaks)], &mut done)?,
            Dtype::Bf16 => {} // WGSL has no bf16
            Dtype::F16 => match WebGpu::<f16>::from_device(gpu.wgpu_device().clone(), gpu.wgpu_queue().clone()) {
                Ok(gpu) => measure(args, vec![(gpu, peaks)], &mut done)?,
                Err(error) => println!("not measured: {error}"),
            },
        }
    }
    Ok(())
}

/// Prints the rows and keeps them.
fn printed<'a>(beside: &'a Beside, rows: &'a mut Vec<Row>) -> impl FnMut(Row) + 'a {
    let table = Table::new(beside);
    move |mut row| {
        beside.add_to(&mut row);
        table.print(&row);
        rows.push(row);
    }
}

impl Args {
    /// What was not named is everything.
    fn fill_in(&mut self) {
        if self.shape.is_empty() {
            self.shape = Shape::all();
        }
        let ranks = if self.sweep { RANKS.to_vec() } else { self.rank.iter().map(|&r| r.into()).collect() };
        if !ranks.is_empty() {
            let ranked = |shape: &Shape| ranks.iter().map(|&r| shape.with_rank(r)).collect::<Vec<_>>();
            self.shape = self.shape.iter().flat_map(ranked).collect();
        }
        if self.threads.is_empty() {
            let all = std::thread::available_parallelism().map_or(1, |n| n.get() as u16);
            self.threads = if all > 1 { vec![1, all] } else { vec![1] };
        }
        if self.verb.is_empty() {
            self.verb = Verb::value_variants().to_vec();
        }
        if self.dtype.is_empty() {
            self.dtype = Dtype::value_variants().to_vec();
        }
    }

    fn effort(&self) -> Effort {
        if self.quick { Effort::QUICK } else { Effort::FULL }
    }
}

/// Every shape and verb, each on every one of the machines.
fn measure<B: Rivals>(args: &Args, machines: Vec<(B, Peaks)>, done: &mut impl FnMut(Row)) -> Result<()> {
    for &shape in &args.shape {
        let mut layer = Layer::new(machines[0].0.clone(), shape)?;
        for &verb in &args.verb {
            let expected = Expected::of(verb, &layer);
            for (backend, peaks) in &machines {
                layer.backend = backend.clone();
                done(measure_one(&layer, verb, &expected, peaks, args.effort())?);
            }
        }
    }
    Ok(())
}

/// Checks everyone, then times everyone.
fn measure_one<B: Rivals>(layer: &Layer<B>, verb: Verb, expected: &Expected, peaks: &Peaks, effort: Effort) -> Result<Row> {
    let mut contenders = contenders(layer, verb)?;
    for contender in &mut contenders {
        contender.run(layer);
        if contender.verb() != verb {
            continue; // not a rival: a part of it
        }
        expected.check(contender.name(), &contender.outputs(layer), contender.roundings());
    }
    let names: Vec<_> = contenders.iter().map(|contender| contender.name().to_owned()).collect();
    let mut runs: Vec<Box<dyn FnMut()>> = Vec::new();
    for contender in &mut contenders {
        runs.push(Box::new(|| contender.run(layer)));
    }
    let seconds = medians(&layer.backend, &mut runs, effort);
    drop(runs);
    let (shape, elem) = (layer.shape, size_of::<B::Elem>());
    let bytes = verb.elements(shape) * elem as f64;
    let share = peaks.share(verb.flop(shape), bytes, verb == Verb::LoraMerge, elem == 2, seconds[0]);
    let seconds = names.into_iter().zip(seconds).collect();
    Ok(Row { verb, backend: B::NAME, dtype: B::Elem::DTYPE.to_string(), shape, threads: peaks.threads, share, seconds })
}
