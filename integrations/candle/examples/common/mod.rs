//! What the examples share.
#![allow(dead_code, reason = "each example uses some of it")]

pub(crate) mod fetch;

use std::path::Path;

use candle_core::DType;
use lowrank_candle::CausalLm;
use lowrank_candle::chat::{Chat, Message};
use lowrank_candle::gguf::Gguf;

/// What an example gives back.
pub(crate) type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// A model, its tokenizer and its template, from a folder of Hugging Face's or a GGUF file.
pub(crate) fn load(path: &Path, dtype: DType) -> Result<(CausalLm, Chat)> {
    if path.extension().is_some_and(|extension| extension == "gguf") {
        let gguf = Gguf::open(path)?;
        return Ok((CausalLm::from_gguf(&gguf, dtype)?, Chat::from_gguf(&gguf)?));
    }
    Ok((CausalLm::from_dir(path, dtype)?, Chat::from_dir(path)?))
}

/// The tokens of a question, as the template asks it.
pub(crate) fn prompt(chat: &Chat, question: &str) -> Result<Vec<u32>> {
    Ok(chat.prompt(&[Message::user(question)])?)
}
