//! The tensors of a folder other than `A` and `B`: DoRA magnitudes, biases, whole layers, rows of embeddings.

use super::config::{AdapterConfig, LayerTarget};
use super::files::{CONFIG_FILE, TENSORS_FILE, bad_tensors};
use super::tensors::HostTensor;
use crate::error::Error;
use crate::nn::Bias;

/// A tensor of a folder that is not a factor.
#[derive(Clone, Debug, PartialEq)]
pub struct Extra {
    /// How it changes the model.
    pub role: Role,
    /// The tensor of the model that it changes, such as `model.layers.0.self_attn.q_proj.bias`.
    pub target: String,
    /// Its elements.
    pub tensor: HostTensor,
}

/// How a tensor that is not a factor changes a tensor of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The norms of the rows of the merged weight: `use_dora`.
    Magnitude,
    /// Added to a bias, multiplied by the scaling of its module: `lora_bias`.
    AddToBias,
    /// Replaces the tensor: `bias`, `modules_to_save`, a larger vocabulary.
    Replace,
    /// Replaces the weight before the update of the module is added: `base_layer.weight`.
    Base,
    /// Replaces some rows of the tensor: `trainable_token_indices`.
    Rows,
}

/// The names (last components) of modules with a row for each token. PEFT saves them whole when the vocabulary was enlarged.
const TABLES: [&str; 9] =
    ["embed_tokens", "lm_head", "wte", "word_embeddings", "tok_embeddings", "embed_in", "embed_out", "shared", "embeddings"];

/// The role of a tensor of this name and the tensor of the model that it changes; `None` if the settings do not include it.
pub(super) fn role(config: &AdapterConfig, name: &str) -> Option<(Role, String)> {
    let module = |end| name.strip_suffix(end).and_then(|module| Some((module, config.lora_config(module)?)));
    if let Some((module, told)) = module(".lora_magnitude_vector") {
        return told.use_dora.then(|| (Role::Magnitude, format!("{module}.weight")));
    }
    if let Some((module, told)) = module(".lora_B.bias") {
        return told.lora_bias.then(|| (Role::AddToBias, format!("{module}.bias")));
    }
    if let Some((module, told)) = module(".base_layer.bias") {
        return (told.bias != Bias::None || is_table(module)).then(|| (Role::Replace, format!("{module}.bias")));
    }
    if let Some(module) = name.strip_suffix(".base_layer.weight") {
        return Some((Role::Base, format!("{module}.weight")));
    }
    if let Some(module) = name.strip_suffix(".token_adapter.trainable_tokens_delta") {
        return config.tokens(module).map(|_| (Role::Rows, format!("{module}.weight")));
    }
    let above = name.match_indices('.').filter_map(|(at, _)| name.get(..at));
    let whole = above.clone().any(|above| config.layer_target(above) == Some(LayerTarget::Whole));
    let bias = name.strip_suffix(".bias").is_some_and(|module| config.layer_target(module) == Some(LayerTarget::Bias));
    let table = [".weight", ".bias"].iter().any(|end| name.strip_suffix(end).is_some_and(is_table));
    (whole || bias || table).then(|| (Role::Replace, name.into()))
}

/// True if a module is a table of the vocabulary: an embedding, or an output head.
fn is_table(module: &str) -> bool {
    TABLES.contains(&module.rsplit('.').next().unwrap_or(module))
}

/// The error for a tensor that no linear layer can use; it says so if the tensor is a factor of an embedding.
pub(super) fn unfit(name: &str) -> Error {
    let ends = [".lora_embedding_A", ".lora_embedding_B"];
    match ends.iter().find(|end| name.ends_with(*end)) {
        Some(end) => {
            let value = format!("`{name}`, an update of an embedding");
            Error::Unsupported { path: TENSORS_FILE.into(), field: &end[1..], value }
        }
        None => unknown(name),
    }
}

/// The error for a tensor that the settings do not include.
pub(super) fn unknown(name: &str) -> Error {
    bad_tensors(format!("`{name}` is not part of an adapter that {CONFIG_FILE} describes"))
}
