//! `cargo run --release -p rivals-cuda`: lowrank's verbs on a GPU beside the same verbs composed of cuBLAS's products.
//!
//! One run measures everything a ratio needs: our verbs, cuBLAS's bare product, the composition, and the ceilings (a copy of a
//! gigabyte, a product of 8192³). Calls are captured in graphs and interleaved; they take turns over as many layers as do not fit
//! the L2 cache, since a model's next layer is not there either. The rows of `--json` are those of `cargo run -p rivals`.

mod blas;
mod layers;
mod measure;
#[path = "../../../benches/shapes/mod.rs"]
mod shapes;

use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;

use clap::Parser;
use cudarc::driver::{CudaContext, CudaStream};
use lowrank::{Cuda, DType, Float, bf16};
use serde_json::{Map, Value, json};

use blas::{Blas, Operand};
use layers::Layers;
use measure::{Call, medians};
use shapes::Shape;

/// lowrank's verbs on a GPU beside the same verbs composed of cuBLAS's products.
#[derive(Parser)]
#[command(version = None)]
struct Args {
    /// A few rounds instead of many
    #[arg(long)]
    quick: bool,
    /// Writes the rows here as well
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Ranks
    #[arg(long, default_values_t = [16])]
    rank: Vec<usize>,
}

fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    if let Err(error) = Cuda::<f32>::new(0) {
        println!("not measured: {error}");
        return if std::env::var("LOWRANK_REQUIRE").is_ok_and(|names| names.contains("cuda")) {
            Err(error.into())
        } else {
            Ok(())
        };
    }
    let context = CudaContext::new(0)?;
    layers::forget_events(&context);
    let stream = context.new_stream()?;
    println!("{}", context.name()?);
    let mut rows = Vec::new();
    for &r in &args.rank {
        measure::<bf16>(&stream, r, &args, &mut rows)?;
        measure::<f32>(&stream, r, &args, &mut rows)?;
    }
    Ok(())
}

/// The shapes of the table; in f32, where products take eight times as long, without the largest.
fn shapes(dtype: DType, r: usize) -> impl Iterator<Item = Shape> {
    let fits = move |shape: &Shape| dtype != DType::F32 || shape.name != "huge";
    Shape::on_big_gpus().into_iter().filter(fits).map(move |shape| shape.with_rank(r))
}

fn measure<E: Float>(stream: &Arc<CudaStream>, r: usize, args: &Args, rows: &mut Vec<Value>) -> Result<(), Box<dyn Error>> {
    let (gpu, rounds) = (Cuda::<E>::from_stream(stream.clone())?, if args.quick { 3 } else { 15 });
    let blas = Blas::new(stream.clone(), E::DTYPE)?;
    let ceilings = ceilings::<E>(stream, &gpu, &blas, rounds)?;
    println!("\n{}, rank {r}: a copy moves {:.0} GB/s, cuBLAS {:.0} GFLOP/s\n", E::DTYPE, ceilings.0 / 1e9, ceilings.1 / 1e9);
    println!("| {:21} | {:22} | {:>10} | {:>8} | rivals: their time over ours |", "verb", "shape", "ours", "ceiling");
    for shape in shapes(E::DTYPE, r) {
        let layers = Layers::<E>::new(&gpu, shape)?;
        layers.check(&gpu, &blas)?;
        for (verb, mut calls) in layers.contenders(&gpu, &blas) {
            let seconds = medians(stream, &mut calls, rounds)?;
            let names: Vec<_> = calls.iter().map(|(name, _)| *name).collect();
            rows.push(report(verb, E::DTYPE, shape, ceilings, &names, &seconds));
            // After each row, so that a run that is stopped leaves what it had.
            if let Some(path) = &args.json {
                std::fs::write(path, serde_json::to_string_pretty(&*rows)? + "\n")?;
            }
        }
    }
    Ok(())
}

/// Bytes a second of a large copy, read and written; operations a second of a large product.
fn ceilings<E: Float>(stream: &Arc<CudaStream>, gpu: &Cuda<E>, blas: &Blas, rounds: usize) -> Result<(f64, f64), Box<dyn Error>> {
    let (bytes, side) = (1usize << 30, if E::DTYPE == DType::F32 { 4096 } else { 8192 });
    let (from, mut to) = (stream.alloc_zeros::<u8>(bytes)?, stream.alloc_zeros::<u8>(bytes)?);
    let (x, w) = (layers::random(gpu, side, side, 1)?, layers::random(gpu, side, side, 2)?);
    let mut y = stream.alloc_zeros::<u8>(side * side * size_of::<E>())?;
    let mut calls: Vec<Call<'_>> = vec![
        ("copy", Box::new(|_| Ok(stream.memcpy_dtod(&from, &mut to)?))),
        (
            "product",
            Box::new(|_| {
                let operands = [Operand(layers::bytes_of(&x), false), Operand(layers::bytes_of(&w), true)];
                blas.multiply([side; 3], 1.0, operands, 0.0, &mut y)
            }),
        ),
    ];
    let seconds = medians(stream, &mut calls, rounds)?;
    Ok((2.0 * bytes as f64 / seconds[0], 2.0 * (side as f64).powi(3) / seconds[1]))
}

/// Prints a row, and makes it for programs: ours first.
fn report(verb: &str, dtype: DType, shape: Shape, ceilings: (f64, f64), names: &[&str], seconds: &[f64]) -> Value {
    let Shape { name, m, k, n, r } = shape;
    let (bytes, flop) = (layers::bytes(verb, dtype, shape), layers::flop(verb, shape));
    let (share, peak) = match (bytes / ceilings.0, flop / ceilings.1) {
        (memory, arithmetic) if memory > arithmetic => (memory / seconds[0], "copy"),
        (_, arithmetic) => (arithmetic / seconds[0], "product"),
    };
    let ratios: Vec<_> = (1..names.len()).map(|i| format!("{} {:.3}×", names[i], seconds[i] / seconds[0])).collect();
    let size = format!("{name} {m}x{k}x{n}");
    println!("| {verb:21} | {size:22} | {:7.1} µs | {:6.1} % | {} |", 1e6 * seconds[0], 100.0 * share, ratios.join(", "));
    let rivals: Map<String, Value> = (1..names.len()).map(|i| (names[i].to_owned(), json!(seconds[i]))).collect();
    json!({
        "verb": verb, "backend": "cuda", "dtype": dtype.to_string(), "shape": name, "rank": r, "threads": 0,
        "seconds": seconds[0], "peak_share": share, "peak": peak, "rivals": rivals,
    })
}
