//! A training step, and generation, of a model of SmolLM2-135M's shape with random weights: this crate beside LoRA by hand in candle.
//!
//! `CANDLE_NUM_THREADS=1 cargo run --release --example measure -- --tokens 96`; peak memory of one alone: `--only ours`, `--only by-hand`

mod by_hand;

use std::collections::HashMap;
use std::time::Instant;

use by_hand::ByHand;
use candle_core::{DType, Device, Tensor};
use clap::{Parser, ValueEnum};
use lowrank_candle::{Adaptable, CausalLm, LoraConfig, ModelConfig, PROJECTIONS, Pass, Rng, Sampling, TargetModules, Tokens};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum Which {
    Ours,
    ByHand,
}

/// Times a step of this crate and one by hand in candle.
#[derive(Debug, Parser)]
struct Args {
    /// Tokens of the sequence.
    #[arg(long, default_value_t = 96)]
    tokens: usize,
    /// Rounds; in each, one step of both.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// One alone, for its peak memory.
    #[arg(long, value_enum)]
    only: Option<Which>,
    /// Layers of the model; SmolLM2-135M has 30.
    #[arg(long, default_value_t = 30)]
    layers: usize,
    /// Also time so many tokens of generation, with the adapter and without.
    #[arg(long, default_value_t = 0)]
    generate: usize,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let model = model(args.layers)?;
    let mut rng = Rng::new(1);
    let ids: Vec<u32> = (0..=args.tokens).map(|_| rng.below(49152) as u32).collect();
    let by_hand = ByHand::of(&model)?;
    for which in [Which::Ours, Which::ByHand] {
        if args.only.is_none_or(|only| only == which) {
            step(which, &model, &by_hand, &ids)?; // warms up
        }
    }
    for round in 0..args.rounds {
        let mut times = Vec::new();
        for which in [Which::Ours, Which::ByHand] {
            if args.only.is_none_or(|only| only == which) {
                let (loss, forward, backward, kept) = step(which, &model, &by_hand, &ids)?;
                println!(
                    "round {round} {which:?}: forward {forward:.3} s, backward {backward:.3} s, loss {loss:.5}, gradients {:.0} MB",
                    kept / 1e6
                );
                times.push(forward + backward);
            }
        }
        if let [ours, by_hand] = times[..] {
            println!("    by hand over ours: {:.2}", by_hand / ours);
        }
    }
    if args.generate > 0 {
        generate(model, &ids[..16], args.generate)?;
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status.lines().filter(|line| line.starts_with("VmHWM")).for_each(|line| println!("{line}"));
    Ok(())
}

/// Forward and backward: the loss, both times in seconds, bytes of gradients.
fn step(which: Which, model: &CausalLm, by_hand: &ByHand, ids: &[u32]) -> Result<(f32, f64, f64, f64)> {
    let begin = Instant::now();
    let t = ids.len() - 1;
    let loss = match which {
        Which::ByHand => by_hand.loss(ids)?,
        Which::Ours => {
            let labels: Vec<Option<u32>> = ids[1..].iter().copied().map(Some).collect();
            model.loss(&Tokens::one(&ids[..t]), &labels, t as f32, &Pass::training(0))?
        }
    };
    let value = loss.to_scalar::<f32>()?;
    let forward = begin.elapsed().as_secs_f64();
    let begin = Instant::now();
    let gradients = loss.backward()?;
    let backward = begin.elapsed().as_secs_f64();
    let bytes = gradients.get_ids().filter_map(|&id| gradients.get_id(id)).map(|g| g.elem_count() * 4).sum::<usize>();
    Ok((value, forward, backward, bytes as f64))
}

fn generate(mut model: CausalLm, prompt: &[u32], tokens: usize) -> Result<()> {
    for round in 0..3 {
        let mut times = Vec::new();
        for active in [&["default"][..], &[]] {
            model.set_active(active)?;
            let begin = Instant::now();
            let made = model.generate(prompt, &Sampling::greedy(tokens))?;
            times.push(begin.elapsed().as_secs_f64() / made.len().max(1) as f64);
        }
        let [with, without] = times[..] else { continue };
        println!(
            "round {round}, a token: {:.1} ms with the adapter, {:.1} ms without: {:.3}",
            with * 1e3,
            without * 1e3,
            with / without
        );
    }
    Ok(())
}

/// SmolLM2-135M's shape with an adapter of rank 6 on all linear layers.
fn model(layers: usize) -> Result<CausalLm> {
    let (d, ff, kv, vocab) = (576, 1536, 192, 49152);
    let config = format!(
        r#"{{"model_type": "llama", "vocab_size": {vocab}, "hidden_size": {d}, "intermediate_size": {ff}, "num_hidden_layers": {layers},
            "num_attention_heads": 9, "num_key_value_heads": 3, "rope_theta": 100000, "rms_norm_eps": 1e-5, "tie_word_embeddings": true,
            "max_position_embeddings": 8192}}"#
    );
    let random = |shape: (usize, usize)| Tensor::randn(0f32, 0.02, shape, &Device::Cpu);
    let ones = || Tensor::ones(d, DType::F32, &Device::Cpu);
    let mut tensors =
        HashMap::from([("model.embed_tokens.weight".to_string(), random((vocab, d))?), ("model.norm.weight".into(), ones()?)]);
    for at in 0..layers {
        for (name, shape) in PROJECTIONS.iter().zip([(d, d), (kv, d), (kv, d), (d, d), (ff, d), (ff, d), (d, ff)]) {
            tensors.insert(format!("model.layers.{at}.{name}.weight"), random(shape)?);
        }
        for name in ["input_layernorm", "post_attention_layernorm"] {
            tensors.insert(format!("model.layers.{at}.{name}.weight"), ones()?);
        }
    }
    let mut model = CausalLm::from_tensors(ModelConfig::from_json(config.as_bytes())?, tensors, DType::F32)?;
    model.add_adapter("default", TargetModules::AllLinear, &LoraConfig::new(6, 8.0), &mut Rng::new(0))?;
    Ok(model)
}
