//! LoRA for language models on candle: train, save, load, merge and serve PEFT adapters, on lowrank's kernels.

pub mod chat;
pub mod data;
pub mod error;
pub mod gguf;
pub mod schedule;
