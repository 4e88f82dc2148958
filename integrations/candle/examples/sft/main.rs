//! Supervised fine-tuning with LoRA, end to end: a model, conversations, an adapter trained, saved, loaded again, merged.
//!
//! `CANDLE_NUM_THREADS=1 cargo run --release --example sft`

mod args;
#[path = "../common/mod.rs"]
mod common;
#[path = "../corpus/mod.rs"]
mod corpus;
mod record;

use std::path::Path;
use std::time::Instant;

use args::Args;
use clap::Parser;
use common::{Result, fetch, load, prompt};
use lowrank_candle::chat::{Answers, Chat};
use lowrank_candle::data::{BatchSettings, Conversation, Dataset, Encoding, TooLong, read_conversations};
use lowrank_candle::schedule::{Decay, Warmup};
use lowrank_candle::sft::{Sft, Step, Trainer, evaluate, plot, progress_bar};
use lowrank_candle::{Adaptable, CausalLm, LoraConfig, Pass, Rng, Sampling, TargetModules, Tokens};

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
    let (mut model, chat) = load(&path, args.dtype.dtype())?;
    let (train, held_back) = data(&chat, args)?;
    println!("{} conversations to train on ({} tokens), {} held back", train.len(), train.tokens(), held_back.len());

    let config = LoraConfig { dropout: 0.05, ..LoraConfig::new(6, 8.0) };
    model.add_adapter("default", TargetModules::AllLinear, &config, &mut Rng::new(0))?;
    let report = model.parameter_report();
    let all = report.original + report.introduced;
    println!("trainable: {} of {all} numbers ({:.4} %)", report.trainable, 100.0 * report.trainable as f64 / all as f64);
    let before = evaluate(&model, &held_back, args.rows)?;
    println!("held-back loss before: {before:.4}");
    println!("> {}\n{}", args.question, answer(&model, &chat, &args.question)?);

    let sft = settings(args);
    let steps = train_adapter(&model, &train, &held_back, sft.clone(), args)?;
    let after = evaluate(&model, &held_back, args.rows)?;
    println!("held-back loss after: {after:.4} (before: {before:.4})");
    println!("> {}\n{}", args.question, answer(&model, &chat, &args.question)?);
    if let Some(path) = &args.record {
        record::write(path, (&sft, &config), (&train, &held_back), [before, after])?;
    }

    let folder = args.out.join("adapter");
    model.save_adapter("default", &folder)?;
    println!("adapter saved to {}", folder.display());
    plot(args.out.join("loss.svg"), &steps, &[(0, before), (steps.len(), after)])?;
    reload_and_merge(&path, &model, &chat, args)?;
    if let Some(bytes) = peak_memory() {
        println!("peak memory: {:.2} GB", bytes / 1e9);
    }
    Ok(())
}

fn data(chat: &Chat, args: &Args) -> Result<(Dataset, Dataset)> {
    let mut conversations: Vec<Conversation> = match &args.data {
        Some(path) => read_conversations(path)?,
        None => corpus::read_folder(&fetch::DIALOGUES.fetch()?)?,
    };
    if let Some(limit) = args.limit {
        Rng::new(1).shuffle(&mut conversations);
        conversations.truncate(limit);
    }
    let encoding = Encoding { answers: Answers::All, max_len: args.max_len, too_long: TooLong::Truncate };
    Ok(Dataset::encode(chat, &conversations, &encoding)?.split(args.held_back, 0)?)
}

fn settings(args: &Args) -> Sft {
    Sft {
        lr: args.lr,
        warmup: Warmup::Ratio(record::WARMUP),
        decay: Decay::Cosine,
        batches: BatchSettings { rows: args.rows, packing: args.packing, epochs: args.epochs, shuffle: Some(0) },
        accumulate: args.accumulate,
        loraplus_lr_ratio: args.loraplus,
        checkpoint: args.gradient_checkpointing,
        ..Sft::default()
    }
}

fn train_adapter(model: &CausalLm, train: &Dataset, held_back: &Dataset, sft: Sft, args: &Args) -> Result<Vec<Step>> {
    let mut trainer = Trainer::new(model, train, sft)?;
    if let Some(dir) = &args.resume {
        trainer.resume(dir)?;
        println!("going on after step {}", trainer.done());
    }
    let (bar, begin) = (progress_bar(trainer.steps()), Instant::now());
    let (mut steps, mut epoch) = (Vec::new(), 0);
    while let Some(step) = trainer.step()? {
        if step.epoch > epoch {
            epoch = step.epoch;
            bar.println(format!("held-back loss after epoch {epoch}: {:.4}", evaluate(model, held_back, args.rows)?));
        }
        step.show(&bar);
        if args.save_steps.is_some_and(|every| every > 0 && trainer.done().is_multiple_of(every)) {
            trainer.save(args.out.join(format!("checkpoint-{}", trainer.done())))?;
        }
        steps.push(step);
    }
    bar.finish();
    let (tokens, seconds) = (steps.iter().map(|step| step.tokens).sum::<usize>(), begin.elapsed().as_secs_f64());
    println!("{} steps, {tokens} tokens in {seconds:.1} s: {:.0} tokens/s", steps.len(), tokens as f64 / seconds);
    Ok(steps)
}

fn answer(model: &CausalLm, chat: &Chat, question: &str) -> Result<String> {
    let prompt = prompt(chat, question)?;
    let sampling = Sampling { stops: chat.stops().to_vec(), ..Sampling::greedy(48) };
    Ok(chat.text(&model.generate(&prompt, &sampling)?)?)
}

/// The saved adapter in a fresh model computes the same, merged it computes nearly the same, and the merged model is saved.
fn reload_and_merge(path: &Path, trained: &CausalLm, chat: &Chat, args: &Args) -> Result<()> {
    let tokens = Tokens::one(&prompt(chat, &args.question)?);
    let logits = |model: &CausalLm| -> Result<Vec<f32>> {
        let pass = Pass::inference();
        let logits = model.logits(&model.hidden(&tokens, &pass)?, &pass)?;
        Ok(logits.to_dtype(candle_core::DType::F32)?.flatten_all()?.to_vec1()?)
    };
    let want = logits(trained)?;
    let (mut fresh, _) = load(path, args.dtype.dtype())?;
    fresh.load_adapter("default", args.out.join("adapter"))?;
    println!("loaded again: the same logits to the bit: {}", logits(&fresh)? == want);
    fresh.merge_and_unload()?;
    let merged = logits(&fresh)?;
    let most = |numbers: &mut dyn Iterator<Item = f32>| numbers.fold(0f32, |most, x| most.max(x.abs()));
    let difference = most(&mut merged.iter().zip(&want).map(|(x, y)| x - y)) / most(&mut want.iter().copied());
    println!("merged: logits differ by {difference:.1e} of the largest");
    let folder = args.out.join("merged");
    fresh.save(&folder)?;
    chat.save(&folder)?;
    println!("merged model saved to {}", folder.display());
    Ok(())
}

/// The most memory that the process had, where the system tells.
fn peak_memory() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<f64>().ok()? * 1024.0)
}
