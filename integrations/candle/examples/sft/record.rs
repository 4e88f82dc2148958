//! A run as a file, from which `scripts/compare-with-peft.py` makes the same run in PEFT.

use std::path::Path;

use lowrank_candle::LoraConfig;
use lowrank_candle::chat::Encoded;
use lowrank_candle::data::{Batches, Dataset};
use lowrank_candle::sft::Sft;
use serde_json::{Value, json};

use crate::common::Result;

/// The share of the steps in which the learning rate rises.
pub(crate) const WARMUP: f64 = 0.03;

/// Writes the settings, the batches in their order, the conversations held back, and the losses on them before and after.
pub(crate) fn write(
    path: &Path,
    (sft, config): (&Sft, &LoraConfig),
    (train, held_back): (&Dataset, &Dataset),
    [before, after]: [f64; 2],
) -> Result<()> {
    let settings = json!({
        "lr": sft.lr, "warmup_ratio": WARMUP, "clip": sft.clip, "rows": sft.batches.rows,
        "r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout,
    });
    let batches: Vec<Value> = Batches::new(train, sft.batches)?
        .map(|batch| batch.conversations.iter().map(|&at| example(&train.examples()[at])).collect())
        .collect();
    let held_back: Vec<Value> = held_back.examples().iter().map(example).collect();
    let record = json!({
        "settings": settings, "batches": batches, "held_back": held_back, "loss": {"before": before, "after": after},
    });
    std::fs::write(path, record.to_string()).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(())
}

fn example(of: &Encoded) -> Value {
    json!({"ids": of.ids, "answer": of.answer})
}
