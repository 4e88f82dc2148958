//! Adapters on a custom model: trains, saves, loads, merges and unmerges adapters of a small decoder with attention blocks.
//!
//! `cargo run --release --example attention`. The model is in `model.rs`, its custom operations on the tape in `ops.rs`. Copy them as a
//! starting point for a model of your own.
#![allow(unreachable_pub, reason = "the modules are as public as they are in a crate of their own")]

mod model;
mod ops;
mod task;

use lowrank::nn::{Adaptable, LoraConfig, Targets};
use lowrank::random::Rng;
use lowrank::{Cpu, Result, adapter};
use model::Decoder;
use task::{Batch, SIZES, train};

fn main() -> Result<()> {
    let cpu = Cpu::<f32>::new()?;
    let base = || Decoder::new(&cpu, SIZES, &mut Rng::new(0));
    let mut model = base()?;
    let config = LoraConfig { dropout: 0.05, ..LoraConfig::new(4, 8.0) };
    model.add_adapters(&cpu, Targets::All, &config, &mut Rng::new(1))?;
    println!("{:?}", model.parameter_report());

    let losses = train(&cpu, &mut model, 200, 5e-3)?;
    for (step, loss) in losses.iter().enumerate().filter(|(step, _)| step % 40 == 0 || step + 1 == losses.len()) {
        println!("step {step:>3}: loss {loss:.3}");
    }

    let x = || Batch::new(&cpu, 8, 1000).map(|batch| batch.x);
    let logits = model.predict(&cpu, x()?)?;
    let dir = std::env::temp_dir().join(format!("lowrank-attention-{}", std::process::id()));
    adapter::save(&cpu, &model, &dir)?;
    let mut loaded = base()?;
    adapter::load(&cpu, &mut loaded, &dir)?;
    std::fs::remove_dir_all(&dir).ok();
    println!("saved, and loaded into a new model: the same logits, {}", loaded.predict(&cpu, x()?)? == logits);

    model.merge_adapters(&cpu)?;
    let merged = model.predict(&cpu, x()?)?;
    let difference = merged.iter().zip(&logits).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    println!("merged: logits within {difference:e}; {:?} are kept for unmerging", model.kept());
    model.unmerge_adapters(&cpu)?;
    println!("unmerged: the same logits, {}", model.predict(&cpu, x()?)? == logits);
    Ok(())
}
