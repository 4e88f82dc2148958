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
use lowrank::{Cpu, Result, bf16, f16};

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
    let peaks: Vec<Peaks> = args.threads.iter().map(|&threads| Peaks::measure(threads.into())).collect();
    println!("{}", Cpu::<f32>::new()?.unit().name());
    peaks.iter().for_each(table::print_peaks);
    let beside = Beside::read(&args.beside)?;
    let table = Table::new(&beside);
    let mut rows = Vec::new();
    let mut done = |mut row: Row| {
        beside.add_to(&mut row);
        table.print(&row);
        rows.push(row);
    };
    for dtype in &args.dtype {
        match dtype {
            Dtype::F32 => measure::<f32>(&args, &peaks, &mut done)?,
            Dtype::Bf16 => measure::<bf16>(&args, &peaks, &mut done)?,
            Dtype::F16 => measure::<f16>(&args, &peaks, &mut done)?,
        }
    }
    if let Some(path) = args.json {
        let rows: Vec<_> = rows.iter().map(Row::json).collect();
        std::fs::write(path, serde_json::to_string_pretty(&rows)? + "\n")?;
    }
    Ok(())
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

/// Every shape, verb and number of threads of one element type.
fn measure<E: Rivals>(args: &Args, peaks: &[Peaks], done: &mut impl FnMut(Row)) -> Result<()> {
    for &shape in &args.shape {
        let mut layer = Layer::<E>::new(shape)?;
        for &verb in &args.verb {
            let expected = Expected::of(verb, &layer);
            for peaks in peaks {
                layer = layer.with_threads(peaks.threads)?;
                done(measure_one(&layer, verb, &expected, peaks, args.effort())?);
            }
        }
    }
    Ok(())
}

/// Checks everyone, then times everyone.
fn measure_one<E: Rivals>(layer: &Layer<E>, verb: Verb, expected: &Expected, peaks: &Peaks, effort: Effort) -> Result<Row> {
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
    let seconds = medians(&mut runs, effort);
    drop(runs);
    let shape = layer.shape;
    let bytes = verb.elements(shape) * size_of::<E>() as f64;
    let share = peaks.share(verb.flop(shape), bytes, verb == Verb::LoraMerge, size_of::<E>() == 2, seconds[0]);
    let seconds = names.into_iter().zip(seconds).collect();
    Ok(Row { verb, dtype: E::DTYPE.to_string(), shape, threads: peaks.threads, share, seconds })
}
