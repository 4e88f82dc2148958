//! `config.json`, made from the settings of a GGUF file.

use std::collections::BTreeMap;

use serde_json::{Value as Json, json};

use super::Metadata;
use super::names::Order;
use crate::error::Result;

/// What llama.cpp takes where a file of Llama 3 does not say it.
const LLAMA3_LENGTH: usize = 8192;
const LLAMA3_LOW: f64 = 1.0;
const LLAMA3_HIGH: f64 = 4.0;

/// How many layers the model has. Errors for an architecture that is not taken.
pub(super) fn layers(metadata: &Metadata) -> Result<usize> {
    let architecture = metadata.architecture()?;
    if !["llama", "qwen2", "qwen3"].contains(&architecture) {
        return Err(metadata.error(format!("its architecture is `{architecture}`, want llama, qwen2 or qwen3")));
    }
    needed(metadata, "block_count")
}

/// The configuration; `names` are the weights there are, `rope_factors` what the file divides the frequencies by.
pub(super) fn config(
    metadata: &Metadata,
    names: &BTreeMap<String, (String, Order)>,
    rope_factors: Option<&[f32]>,
) -> Result<Json> {
    let architecture = metadata.architecture()?;
    refuse_other_models(metadata)?;
    let (hidden, heads) = (needed(metadata, "embedding_length")?, needed(metadata, "attention.head_count")?);
    if heads == 0 || hidden == 0 {
        return Err(metadata.error("it states a model without heads or columns"));
    }
    let head = optional(metadata, "attention.key_length")?.unwrap_or(hidden / heads);
    let rotated = optional(metadata, "rope.dimension_count")?.unwrap_or(head);
    if rotated != head {
        return Err(metadata.error(format!("it rotates {rotated} of the {head} columns of a head; want all of them")));
    }
    let theta = metadata.real(&key(metadata, "rope.freq_base")?)?.unwrap_or(10_000.0);
    let class = match architecture {
        "llama" => "LlamaForCausalLM",
        "qwen2" => "Qwen2ForCausalLM",
        _ => "Qwen3ForCausalLM",
    };
    let mut config = json!({
        "architectures": [class],
        "model_type": architecture,
        "vocab_size": vocabulary(metadata)?,
        "hidden_size": hidden,
        "intermediate_size": needed(metadata, "feed_forward_length")?,
        "num_hidden_layers": needed(metadata, "block_count")?,
        "num_attention_heads": heads,
        "num_key_value_heads": optional(metadata, "attention.head_count_kv")?.unwrap_or(heads),
        "head_dim": head,
        "hidden_act": "silu",
        "max_position_embeddings": needed(metadata, "context_length")?,
        "rms_norm_eps": metadata.real(&key(metadata, "attention.layer_norm_rms_epsilon")?)?
            .ok_or_else(|| metadata.error("it does not say the epsilon of its norms"))?,
        "rope_theta": theta,
        "rope_scaling": rope_scaling(metadata, theta, head, rope_factors)?,
        "tie_word_embeddings": !names.contains_key("lm_head.weight"),
        "torch_dtype": "float32",
    });
    if architecture != "qwen2" {
        config["attention_bias"] = json!(names.contains_key("model.layers.0.self_attn.q_proj.bias"));
    }
    if architecture == "llama" {
        config["mlp_bias"] = json!(names.contains_key("model.layers.0.mlp.gate_proj.bias"));
    }
    for (name, stored) in [("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")] {
        if let Some(token) = metadata.whole(&format!("tokenizer.ggml.{stored}_token_id"))? {
            config[name] = json!(token);
        }
    }
    Ok(config)
}

fn refuse_other_models(metadata: &Metadata) -> Result<()> {
    for (setting, problem) in [
        ("expert_count", "it is a mixture of experts; dense models are taken"),
        ("attention.sliding_window", "its attention has a sliding window; models that attend to all that came before are taken"),
    ] {
        if optional(metadata, setting)?.is_some_and(|value| value > 0) {
            return Err(metadata.error(problem));
        }
    }
    Ok(())
}

fn key(metadata: &Metadata, setting: &str) -> Result<String> {
    Ok(format!("{}.{setting}", metadata.architecture()?))
}

fn optional(metadata: &Metadata, setting: &str) -> Result<Option<usize>> {
    metadata.whole(&key(metadata, setting)?)
}

fn needed(metadata: &Metadata, setting: &str) -> Result<usize> {
    let key = key(metadata, setting)?;
    metadata.whole(&key)?.ok_or_else(|| metadata.error(format!("it does not have `{key}`")))
}

fn vocabulary(metadata: &Metadata) -> Result<usize> {
    if let Some(size) = optional(metadata, "vocab_size")? {
        return Ok(size);
    }
    let tokens = metadata.list("tokenizer.ggml.tokens", "a list", |_| Some(()))?;
    tokens.map(|tokens| tokens.len()).ok_or_else(|| metadata.error("it does not say the size of its vocabulary"))
}

fn rope_scaling(metadata: &Metadata, theta: f64, head: usize, factors: Option<&[f32]>) -> Result<Json> {
    let scaling = metadata.text(&key(metadata, "rope.scaling.type")?)?;
    let factor = metadata.real(&key(metadata, "rope.scaling.factor")?)?;
    match (scaling, factors) {
        (None | Some("none"), None) => Ok(Json::Null),
        (Some("linear"), None) => {
            let factor =
                factor.ok_or_else(|| metadata.error("it scales its rotary embedding, but does not say by which factor"))?;
            Ok(json!({"rope_type": "linear", "factor": factor}))
        }
        (None | Some("none"), Some(factors)) => {
            let length = optional(metadata, "rope.scaling.original_context_length")?.unwrap_or(LLAMA3_LENGTH);
            llama3(theta, head, length, factors)
                .ok_or_else(|| metadata.error("its `rope_freqs.weight` is not the scaling of Llama 3, the only one taken"))
        }
        (Some(other), _) => Err(metadata.error(format!("it scales its rotary embedding as `{other}`, want linear or Llama 3's"))),
    }
}

/// The settings of Llama 3 that give these factors, if they do: the file holds the factors and not the settings.
fn llama3(theta: f64, head: usize, length: usize, factors: &[f32]) -> Option<Json> {
    let factor = f64::from(factors.iter().copied().fold(1.0, f32::max)).round();
    let agree = factors.len() == head / 2
        && factors.iter().enumerate().all(|(j, &stored)| {
            let wavelength = std::f64::consts::TAU * theta.powf(2.0 * j as f64 / head as f64);
            let place = (length as f64 / wavelength - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW);
            let smooth = place.clamp(0.0, 1.0);
            let want = 1.0 / ((1.0 - smooth) / factor + smooth);
            (f64::from(stored) - want).abs() <= 1e-5 * want
        });
    agree.then(|| {
        json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": LLAMA3_LOW,
            "high_freq_factor": LLAMA3_HIGH,
            "original_max_position_embeddings": length,
        })
    })
}
