//! Serves one base model with many adapters: a stream of requests, each for one of them, a few of which are much in demand.
//!
//! All adapters are folders on disk, as PEFT writes them. A bank has slots for some of them; a batch takes its requests in the order
//! they come, whatever their adapters are, and fetches those that are in no slot.
//!
//! ```text
//! cargo run --release --example serve_adapters -- --adapters 1,8,64,512 --slots 32
//! ```
//!
//! `serving.rs` is the part to read; `chart.rs` draws.

#![allow(unreachable_pub, reason = "an example exports nothing")]

mod chart;
mod serving;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use lowrank::file::write_whole;
use lowrank::{Cpu, Result};

use serving::{Served, Settings, serve};

/// Serves a base model with many adapters, and prints tokens a second, latency and cache hits.
#[derive(Parser)]
#[command(name = "serve_adapters", version)]
struct Args {
    /// Numbers of adapters, one table row each
    #[arg(long, value_delimiter = ',', default_values_t = [1, 8, 64, 512])]
    adapters: Vec<usize>,
    /// Adapters that are in memory at the same time
    #[arg(long, default_value_t = 32)]
    slots: usize,
    /// Rows of a batch: tokens that are computed together
    #[arg(long, default_value_t = 16)]
    rows: usize,
    /// Batches to serve for each table row
    #[arg(long, default_value_t = 200)]
    batches: usize,
    /// Inputs and outputs of the layers
    #[arg(long, default_value_t = 1024)]
    width: usize,
    /// Number of layers
    #[arg(long, default_value_t = 4)]
    layers: usize,
    /// Rank of the adapters
    #[arg(long, default_value_t = 16)]
    rank: usize,
    /// Exponent of Zipf's law for the requests; 0 requests all adapters equally often
    #[arg(long, default_value_t = 1.0)]
    skew: f64,
    /// Threads [default: all]
    #[arg(long)]
    threads: Option<usize>,
    /// Of weights, adapters and requests
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Draw the table to this file, as SVG
    #[arg(long, value_name = "FILE")]
    chart: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let cpu = Cpu::<f32>::new()?;
    let cpu = args.threads.map_or(Ok(cpu.clone()), |threads| cpu.with_threads(threads))?;
    let &Args { slots, rows, batches, width, layers, rank, skew, seed, .. } = args;
    println!("{} rows a batch, {layers} layers {width}×{width}, rank {rank}, {slots} slots, on {cpu:?}", rows);
    println!(
        "{:>9} {:>10} {:>12} {:>12} {:>8} {:>8} {:>12}",
        "adapters", "tokens/s", "p50 ms", "p99 ms", "hits", "loads", "all resident"
    );
    let mut table = Vec::new();
    for &adapters in &args.adapters {
        let settings = Settings { adapters, slots, rows, batches, width, layers, rank, skew, seed };
        let served = serve(&cpu, settings)?;
        // The same requests with a slot for every adapter: what fetching costs.
        let resident = if adapters > slots { Some(serve(&cpu, Settings { slots: adapters, ..settings })?) } else { None };
        print_row(adapters, &served, resident.as_ref());
        table.push((adapters, served));
    }
    args.chart.as_deref().map_or(Ok(()), |path| write_whole(path, chart::tokens(&table)?.as_bytes()))
}

fn print_row(adapters: usize, served: &Served, resident: Option<&Served>) {
    let all = resident.map_or("-".into(), |resident| format!("{:.2}", served.tokens_a_second() / resident.tokens_a_second()));
    println!(
        "{adapters:>9} {:>10.0} {:>12.2} {:>12.2} {:>7.1}% {:>8} {all:>12}",
        served.tokens_a_second(),
        served.latency(0.5) * 1e3,
        served.latency(0.99) * 1e3,
        served.hit_rate() * 100.0,
        served.loads,
    );
}
