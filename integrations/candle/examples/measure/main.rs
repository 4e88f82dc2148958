//! Training steps of a model of SmolLM2-135M's shape with random weights, on one sequence: this crate, LoRA by hand in candle, and
//! transformers with PEFT; and generation with an adapter, beside the base model.
//!
//! ```sh
//! CANDLE_NUM_THREADS=1 cargo run --release --example measure -- --tokens 96 --python python3
//! CANDLE_NUM_THREADS=1 cargo run --release --example measure -- --generate 64
//! ```
//!
//! A step is forward, backward and AdamW. In each round everyone makes one step, and each round begins with another one. Ratios are medians
//! of the rounds' ratios.

mod by_hand;
mod contestants;
mod model;
mod table;

use candle_core::DType;
use clap::Parser;
use contestants::{Contestant, Who};
use lowrank_candle::chat::Encoded;
use lowrank_candle::data::Dataset;
use lowrank_candle::{Adaptable, CausalLm, Sampling};
use model::{ids, model};
use table::{Clock, Table};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Times training steps, or generation.
#[derive(Debug, Parser)]
struct Args {
    /// Tokens of the sequence.
    #[arg(long, default_value_t = 96)]
    tokens: usize,
    /// Rounds; in each, one step of everyone.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// One alone, for its peak memory and the gradients it keeps.
    #[arg(long, value_enum)]
    only: Option<Who>,
    /// A Python with torch, transformers and peft, which takes part.
    #[arg(long)]
    python: Option<String>,
    /// Count the time of processors, not of the clock, where others use the machine too. With one thread: RAYON_NUM_THREADS=1.
    #[arg(long)]
    cpu_time: bool,
    /// Layers of the model; SmolLM2-135M has 30.
    #[arg(long, default_value_t = 30)]
    layers: usize,
    /// Generate so many tokens instead, with the adapter and without.
    #[arg(long)]
    generate: Option<usize>,
}

impl Args {
    fn clock(&self) -> Clock {
        if self.cpu_time { Clock::Cpu } else { Clock::Wall }
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    if let Some(tokens) = args.generate {
        return generate(model(args.layers, DType::F32)?, &ids(16), tokens, &args);
    }
    let takes_part = |who: &Who| match args.only {
        Some(only) => *who == only,
        None => *who != Who::Peft || args.python.is_some(),
    };
    let everyone: Vec<Who> = [Who::Ours, Who::ByHand, Who::Peft].into_iter().filter(takes_part).collect();
    let data = Dataset::from_examples(vec![Encoded { ids: ids(args.tokens), answer: vec![true; args.tokens] }])?;
    let model = everyone.iter().any(|who| *who != Who::Peft).then(|| model(args.layers, DType::F32)).transpose()?;
    let mut contestants = Vec::new();
    for who in &everyone {
        contestants.push(who.enter(model.as_ref(), &data, &args)?);
    }
    steps(&everyone, &mut contestants, args.rounds)?;
    for (who, contestant) in everyone.iter().zip(&mut contestants).filter(|_| args.only.is_some()) {
        let kept = contestant.kept()?.map_or("not asked".into(), |bytes| format!("{:.1} MB", bytes as f64 / 1e6));
        println!("{who:?}: peak memory {:.3} GB; gradients kept {kept}", contestant.peak()? as f64 / 1e9);
    }
    Ok(())
}

/// The rounds of training steps.
fn steps(everyone: &[Who], contestants: &mut [Box<dyn Contestant + '_>], rounds: usize) -> Result<()> {
    let mut table = Table::new(everyone.iter().map(|who| format!("{who:?}")).collect());
    for contestant in contestants.iter_mut() {
        contestant.step()?; // warms up
    }
    for round in 0..rounds {
        let mut seconds = vec![0.0; everyone.len()];
        for turn in 0..everyone.len() {
            let at = (round + turn) % everyone.len();
            let (loss, time) = contestants[at].step()?;
            println!("round {round} {:?}: {time:.3} s, loss {loss:.5}", everyone[at]);
            seconds[at] = time;
        }
        table.add(seconds);
    }
    print!("{table}");
    Ok(())
}

/// Rounds of generation with the adapter and without.
fn generate(mut model: CausalLm, prompt: &[u32], tokens: usize, args: &Args) -> Result<()> {
    let mut table = Table::new(vec!["without the adapter".into(), "with it".into()]);
    for round in 0..=args.rounds {
        let mut seconds = vec![0.0; 2];
        for turn in 0..2 {
            let with = (round + turn) % 2;
            model.set_active(if with == 1 { &["default"] } else { &[] })?;
            let begin = args.clock().now()?;
            let made = model.generate(prompt, &Sampling::greedy(tokens))?;
            seconds[with] = (args.clock().now()? - begin) / made.len().max(1) as f64;
        }
        if round > 0 {
            table.add(seconds); // the first round warms up
        }
    }
    print!("a token of generation\n{table}");
    Ok(())
}
