//! The tokenizer of a GGUF file, made into the `tokenizer.json` that transformers has for it.

use std::collections::{BTreeMap, HashSet};

use candle_core::quantized::gguf_file::Value;
use serde_json::{Map, Value as Json, json};
use tokenizers::Tokenizer;

use super::Metadata;
use crate::error::Result;

/// The kinds of tokens that are found in a text before anything else is.
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// How a text is cut before byte pairs are merged, by llama.cpp's names.
const GPT2: [&str; 2] = ["gpt-2", "default"];
const SMOLLM: &str = "smollm";
const LLAMA3: [&str; 3] = ["llama-bpe", "llama3", "llama-v3"];
const QWEN2: &str = "qwen2";

pub(super) fn tokenizer(metadata: &Metadata) -> Result<Tokenizer> {
    let json = described(metadata)?;
    Tokenizer::from_bytes(json.to_string()).map_err(|error| metadata.error(format!("its tokenizer cannot be used: {error}")))
}

pub(super) fn special_tokens(metadata: &Metadata) -> Result<BTreeMap<String, String>> {
    let (tokens, mut special) = (tokens(metadata)?, BTreeMap::new());
    for (name, stored) in [("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")] {
        let key = format!("tokenizer.ggml.{stored}_token_id");
        if let Some(id) = metadata.whole(&key)? {
            let token = tokens.get(id);
            let token = token.ok_or_else(|| metadata.error(format!("`{key}` is {id}, but there are {} tokens", tokens.len())))?;
            special.insert(name.to_owned(), (*token).to_owned());
        }
    }
    Ok(special)
}

fn tokens<'f>(metadata: &Metadata<'f>) -> Result<Vec<&'f str>> {
    texts(metadata, "tokenizer.ggml.tokens")?.ok_or_else(|| metadata.error("it has no tokenizer; put tokenizer.json beside it"))
}

fn texts<'f>(metadata: &Metadata<'f>, key: &str) -> Result<Option<Vec<&'f str>>> {
    metadata.list(key, "a list of texts", |value| match value {
        Value::String(text) => Some(text.as_str()),
        _ => None,
    })
}

fn described(metadata: &Metadata) -> Result<Json> {
    let kind = metadata.text("tokenizer.ggml.model")?.unwrap_or("none");
    if kind != "gpt2" {
        let problem = format!(
            "its tokenizer is of the kind `{kind}`; byte-level BPE (`gpt2`) is taken, for others tokenizer.json is needed"
        );
        return Err(metadata.error(problem));
    }
    let cut = metadata.text("tokenizer.ggml.pre")?.unwrap_or("default");
    let (normalizer, pre_tokenizer) = cutting(cut).ok_or_else(|| {
        metadata.error(format!(
            "its tokenizer cuts texts as `{cut}`, want {SMOLLM}, {QWEN2}, llama-bpe or gpt-2; for others tokenizer.json is needed"
        ))
    })?;
    let tokens = tokens(metadata)?;
    let mut vocabulary = Map::new();
    for (id, token) in tokens.iter().enumerate() {
        if vocabulary.insert((*token).to_owned(), json!(id)).is_some() {
            return Err(metadata.error(format!("its token `{token}` is there twice")));
        }
    }
    let merges = texts(metadata, "tokenizer.ggml.merges")?.ok_or_else(|| metadata.error("its tokenizer has no merges"))?;
    let llama3 = LLAMA3.contains(&cut);
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added(metadata, &tokens)?,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor(metadata, &tokens, llama3)?,
        "decoder": byte_level(true),
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": llama3,
            "vocab": vocabulary,
            "merges": merges,
        },
    }))
}

/// The normalizer and the pre-tokenizer.
fn cutting(name: &str) -> Option<(Json, Json)> {
    let sequence = |first: Json, then: Json| json!({"type": "Sequence", "pretokenizers": [first, then]});
    let words = |digits: &str| {
        let pattern = format!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        );
        json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
    };
    match name {
        SMOLLM => Some((Json::Null, sequence(json!({"type": "Digits", "individual_digits": true}), byte_level(true)))),
        QWEN2 => Some((json!({"type": "NFC"}), sequence(words(r"\p{N}"), byte_level(false)))),
        name if LLAMA3.contains(&name) => Some((Json::Null, sequence(words(r"\p{N}{1,3}"), byte_level(false)))),
        name if GPT2.contains(&name) => Some((Json::Null, byte_level(true))),
        _ => None,
    }
}

fn byte_level(with_pattern_of_gpt2: bool) -> Json {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": with_pattern_of_gpt2})
}

fn added(metadata: &Metadata, tokens: &[&str]) -> Result<Vec<Json>> {
    let kinds = metadata.list("tokenizer.ggml.token_type", "a list of whole numbers", |value| match *value {
        Value::I32(kind) => Some(i64::from(kind)),
        Value::U32(kind) => Some(i64::from(kind)),
        _ => None,
    })?;
    let kinds = kinds.unwrap_or_default();
    if !kinds.is_empty() && kinds.len() != tokens.len() {
        return Err(metadata.error(format!("it has {} tokens, but the kinds of {}", tokens.len(), kinds.len())));
    }
    // A special token is one even where the file does not mark it.
    let named: HashSet<String> = special_tokens(metadata)?.into_values().collect();
    let kind = |id: usize| kinds.get(id).copied().unwrap_or(0);
    let is_special = |id: usize| kind(id) == CONTROL || (kinds.is_empty() && named.contains(tokens[id]));
    let picked = (0..tokens.len()).filter(|&id| is_special(id) || kind(id) == USER_DEFINED);
    Ok(picked
        .map(|id| {
            json!({
                "id": id,
                "content": tokens[id],
                "single_word": false,
                "lstrip": false,
                "rstrip": false,
                "normalized": false,
                "special": is_special(id),
            })
        })
        .collect())
}

/// Puts the token that begins a text before it, where the model wants it; chat templates write it themselves.
fn post_processor(metadata: &Metadata, tokens: &[&str], llama3: bool) -> Result<Json> {
    let id = metadata.whole("tokenizer.ggml.bos_token_id")?;
    let begins = metadata.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(llama3);
    let Some((id, token)) = id.and_then(|id| Some((id, *tokens.get(id)?))).filter(|_| begins) else {
        return Ok(byte_level(true));
    };
    let text = |name: &str, kind: usize| json!({"Sequence": {"id": name, "type_id": kind}});
    let bos = |kind: usize| json!({"SpecialToken": {"id": token, "type_id": kind}});
    Ok(json!({
        "type": "TemplateProcessing",
        "single": [bos(0), text("A", 0)],
        "pair": [bos(0), text("A", 0), bos(1), text("B", 1)],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
    }))
}
