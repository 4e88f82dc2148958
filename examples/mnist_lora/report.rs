//! The results of the experiment, as tables and as JSON.

use crate::mnist::{DIGITS, Mnist};
use lowrank::{Error, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::args::Args;
use crate::experiment::{Full, Outcome, Score};

/// Prints the backend, the number of processes if there are several, and the data.
pub fn begin(device: &str, ranks: usize, source: &str, mnist: &Mnist) {
    println!("backend  {device}");
    if ranks > 1 {
        println!("ranks    {ranks}, each with such a backend");
    }
    println!("digits   {source}: {} to train on, {} to test with", mnist.train.len(), mnist.test.len());
}

/// The checks of the results: key in the JSON, sentence, and whether it holds.
fn checks(outcome: &Outcome) -> [(&'static str, &'static str, bool); 4] {
    let Outcome { base, on, off, reloaded, merged_difference, merged_tolerance, .. } = outcome;
    [
        ("base_unchanged", "the base weights are unchanged, bit for bit", outcome.base_unchanged),
        ("off_equals_base", "with the adapters off, every logit is what it was before", off == base),
        ("reloaded_equals", "saved and loaded again, every logit is the same", reloaded == on),
        ("merged_equals_on", "merged, every logit is the same within rounding", merged_difference <= merged_tolerance),
    ]
}

/// Errors: [`Error::Value`] if a check does not hold, so that scripts notice.
pub fn verdict(outcome: &Outcome) -> Result<()> {
    match checks(outcome).into_iter().find(|(.., holds)| !holds) {
        None => Ok(()),
        Some((name, ..)) => Err(Error::Value { verb: "mnist_lora", name, got: "false".into(), want: "true".into() }),
    }
}

/// Prints the results.
pub fn tables(outcome: &Outcome, counts: &[usize; DIGITS]) {
    let Outcome { base, on, off, merged, digit, params, .. } = outcome;
    println!("\ntest errors      images    before   adapters on       off    merged");
    for d in 0..DIGITS {
        let mark = if d == usize::from(*digit) { "<- tuned" } else { "" };
        let [before, on, off, merged] = [base, on, off, merged].map(|score| score.errors[d]);
        println!("  digit {d}        {:7} {before:9} {on:13} {off:9} {merged:9}  {mark}", counts[d]);
    }
    let [before_all, on_all, off_all, merged_all] = [base, on, off, merged].map(|score| score.errors.iter().sum::<usize>());
    println!("  all            {:7} {before_all:9} {on_all:13} {off_all:9} {merged_all:9}", counts.iter().sum::<usize>());
    let [before_part, on_part, off_part, merged_part] = [base, on, off, merged].map(|score| 100.0 * score.accuracy);
    println!("  accuracy in %          {before_part:9.2} {on_part:13.2} {off_part:9.2} {merged_part:9.2}");

    let (was, is) = (base.errors[usize::from(*digit)], on.errors[usize::from(*digit)]);
    let fall = 100.0 * (1.0 - is as f64 / was.max(1) as f64);
    println!("\ndigit {digit}: {was} errors -> {is} ({fall:.0} % fewer), with the adapters tuned on nothing else");
    if let Some(full) = &outcome.full {
        quantised(full, outcome);
    }
    println!("\nparameters of the model     {:>9}", thousands(params.original));
    println!("parameters of the adapters  {:>9}  ({:.3} %)", thousands(params.introduced), params.percent());
    for (phase, name) in [(&outcome.pretrain, "training"), (&outcome.tune, "tuning")] {
        let step = 1e3 * phase.seconds / phase.losses.len().max(1) as f64;
        println!("{name:27} {:9.2} s  ({} steps of {step:.2} ms)", phase.seconds, phase.losses.len());
    }
    println!();
    for (_, says, holds) in checks(outcome) {
        println!("{}  {says}", if holds { "yes" } else { "NO " });
    }
    println!("     (largest difference {:.1e}, rounding explains {:.1e})", outcome.merged_difference, outcome.merged_tolerance);
}

/// Prints what quantising the weights saved and changed.
fn quantised(full: &Full, outcome: &Outcome) {
    let all = |score: &Score| score.errors.iter().sum::<usize>();
    let of = |score: &Score| score.errors[usize::from(outcome.digit)];
    println!("\nweights quantised as {}: {} bytes, {} before", full.kind, thousands(full.quantised_bytes), thousands(full.bytes));
    println!("test errors            digit {}       all   accuracy in %", outcome.digit);
    let rows = [("before the adapters", &full.base, &outcome.base), ("with the adapters", &full.on, &outcome.on)];
    for (when, full, quantised) in rows {
        for (model, score) in [("full", full), ("quantised", quantised)] {
            println!("  {when:20} {model:9} {:7} {:9} {:15.2}", of(score), all(score), 100.0 * score.accuracy);
        }
    }
}

/// All results. The keys are stable, because scripts read them.
pub fn json(outcome: &Outcome, args: &Args, device: &str, source: &str) -> Value {
    let Outcome { base, on, off, merged, reloaded, params, pretrain, tune, .. } = outcome;
    let mut figures = json!({
        "seed": args.seed,
        "backend": device,
        "data": source,
        "rank": args.rank,
        "alpha": args.alpha,
        "lr": args.lr,
        "epochs": args.epochs,
        "base_accuracy": base.accuracy,
        "base_errors": base.errors,
        "digit": outcome.digit,
        "lora_errors": on.errors,
        "off_errors": off.errors,
        "merged_errors": merged.errors,
        "reloaded_errors": reloaded.errors,
        "lora_accuracy": on.accuracy,
        "params_original": params.original,
        "params_lora": params.introduced,
        "params_percent": params.percent(),
        "pretrain_seconds": pretrain.seconds,
        "pretrain_steps": pretrain.losses.len(),
        "tune_seconds": tune.seconds,
        "tune_steps": tune.losses.len(),
        "merged_difference": outcome.merged_difference,
        "merged_tolerance": outcome.merged_tolerance,
    });
    if let Some(full) = &outcome.full {
        figures["quantised"] = full.kind.name().into();
        figures["weight_bytes"] = json!({ "full": full.bytes, "quantised": full.quantised_bytes });
        figures["full_errors"] = json!({ "base": full.base.errors, "lora": full.on.errors });
        figures["full_accuracy"] = json!({ "base": full.base.accuracy, "lora": full.on.accuracy });
    }
    for (key, _, holds) in checks(outcome) {
        figures[key] = holds.into();
    }
    figures["weights_sha256"] = digest(&outcome.weights).into();
    figures["pretrain_losses"] = json!(pretrain.losses);
    figures["tune_losses"] = json!(tune.losses);
    figures
}

/// A digest of the bits of all weights, to compare two runs.
fn digest(weights: &[Vec<f32>]) -> String {
    let mut sum = Sha256::new();
    for weight in weights.iter().flatten() {
        sum.update(weight.to_le_bytes());
    }
    sum.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Groups digits: 2807010 as 2,807,010.
fn thousands(number: usize) -> String {
    let digits = number.to_string();
    let groups: Vec<&str> = digits.as_bytes().rchunks(3).rev().filter_map(|group| std::str::from_utf8(group).ok()).collect();
    groups.join(",")
}
