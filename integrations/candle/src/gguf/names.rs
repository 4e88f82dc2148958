//! The names of weights: llama.cpp's and those of transformers.

use std::collections::{BTreeMap, HashMap};

use candle_core::quantized::gguf_file::TensorInfo;

/// What Llama 3 divides each frequency of its rotary embedding by; not a weight of the model.
pub(super) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// How the rows of a stored tensor lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    AsStored,
    /// The two halves of each head of the queries are interleaved.
    QueryHeads,
    /// The two halves of each head of the keys are interleaved.
    KeyHeads,
}

const WHOLE_MODEL: [(&str, &str); 3] = [
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
];

/// `blk.N.` and one of these is `model.layers.N.` and the other.
const IN_LAYER: [(&str, &str); 11] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// For each weight in transformers, the tensor that holds it. The error says which tensor none of these architectures has, or which is not there.
pub(super) fn in_transformers(
    stored: &HashMap<String, TensorInfo>,
    architecture: &str,
    layers: usize,
) -> Result<BTreeMap<String, (String, Order)>, String> {
    let mut names = BTreeMap::new();
    for name in stored.keys().filter(|name| *name != ROPE_FACTORS) {
        let weight = translated(name, layers)
            .ok_or_else(|| format!("tensor `{name}` is of no dense {architecture} model with {layers} layers"))?;
        names.insert(weight, (name.clone(), order(name, architecture)));
    }
    let mut needed = vec!["model.embed_tokens.weight".to_owned(), "model.norm.weight".to_owned()];
    for layer in 0..layers {
        let in_layer = IN_LAYER.iter().filter(|(_, name)| architecture == "qwen3" || !name.ends_with("_norm"));
        needed.extend(in_layer.map(|(_, name)| format!("model.layers.{layer}.{name}.weight")));
    }
    match needed.iter().find(|name| !names.contains_key(*name)) {
        Some(missing) => Err(format!("the weight that transformers calls `{missing}` is missing")),
        None => Ok(names),
    }
}

fn translated(name: &str, layers: usize) -> Option<String> {
    if let Some((_, translated)) = WHOLE_MODEL.iter().find(|(stored, _)| *stored == name) {
        return Some((*translated).to_owned());
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let (module, part) = rest.rsplit_once('.')?;
    let layer: usize = layer.parse().ok().filter(|&layer| layer < layers)?;
    let (_, translated) = IN_LAYER.iter().find(|(stored, _)| *stored == module)?;
    matches!(part, "weight" | "bias").then(|| format!("model.layers.{layer}.{translated}.{part}"))
}

/// Only files of `llama` have rows interleaved; llama.cpp rotates the halves of Qwen's heads as transformers does.
fn order(name: &str, architecture: &str) -> Order {
    match name.rsplit('.').nth(1) {
        Some("attn_q") if architecture == "llama" => Order::QueryHeads,
        Some("attn_k") if architecture == "llama" => Order::KeyHeads,
        _ => Order::AsStored,
    }
}
