//! What a folder may hold beside the factors: lengths of rows, biases, layers kept whole.

use super::config::{AdapterConfig, LayerTarget};
use super::tensors::refused;
use super::{CONFIG_FILE, HostTensor, TENSORS_FILE};
use crate::error::Error;
use crate::nn::Bias;

/// A tensor of a folder that is no factor.
#[derive(Clone, Debug, PartialEq)]
pub struct Extra {
    /// What it does.
    pub role: Role,
    /// To which tensor of the model: `model.layers.0.self_attn.q_proj.bias`.
    pub target: String,
    /// Its numbers.
    pub tensor: HostTensor,
}

/// What a tensor that is no factor does to a tensor of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Tells how long the rows of a weight are once its update is in: `use_dora`.
    Magnitude,
    /// Is added to a bias, times the scaling of its module: `lora_bias`.
    AddToBias,
    /// Takes its place: `bias`, `modules_to_save`, a vocabulary that grew.
    Replace,
    /// Takes its place before the update of the module is added: `base_layer.weight`.
    Base,
    /// Takes the place of some of its rows: `trainable_token_indices`.
    Rows,
}

/// The last names of modules that hold a row for each token. PEFT saves them whole when the vocabulary grew.
const TABLES: [&str; 9] =
    ["embed_tokens", "lm_head", "wte", "word_embeddings", "tok_embeddings", "embed_in", "embed_out", "shared", "embeddings"];

/// What a tensor of this name is for, and the tensor of the model that it is about; `None` if the settings know of no such tensor.
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
    let whole = above.clone().any(|above| config.asks(above) == Some(LayerTarget::Whole));
    let bias = name.strip_suffix(".bias").is_some_and(|module| config.asks(module) == Some(LayerTarget::Bias));
    let table = [".weight", ".bias"].iter().any(|end| name.strip_suffix(end).is_some_and(is_table));
    (whole || bias || table).then(|| (Role::Replace, name.into()))
}

fn is_table(module: &str) -> bool {
    TABLES.contains(&module.rsplit('.').next().unwrap_or(module))
}

/// Why a tensor is refused that no linear layer can take: of updates of other layers, what they are.
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

/// Why a tensor that the settings do not know of is refused.
pub(super) fn unknown(name: &str) -> Error {
    refused(format!("`{name}` is not part of an adapter that {CONFIG_FILE} describes"))
}
