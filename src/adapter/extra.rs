//! What a folder may hold beside the factors: lengths of rows, biases, layers kept whole.

use super::config::{AdapterConfig, Asked};
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
    Plus,
    /// Takes its place: `bias`, `modules_to_save`.
    Instead,
}

/// What a tensor of this name is for, and the tensor of the model that it is about; `None` if the settings know of no such tensor.
pub(super) fn role(config: &AdapterConfig, name: &str) -> Option<(Role, String)> {
    let module = |end| name.strip_suffix(end).and_then(|module| Some((module, config.lora_config(module)?)));
    if let Some((module, told)) = module(".lora_magnitude_vector") {
        return told.use_dora.then(|| (Role::Magnitude, format!("{module}.weight")));
    }
    if let Some((module, told)) = module(".lora_B.bias") {
        return told.lora_bias.then(|| (Role::Plus, format!("{module}.bias")));
    }
    if let Some((module, told)) = module(".base_layer.bias") {
        return (told.bias != Bias::None).then(|| (Role::Instead, format!("{module}.bias")));
    }
    let above = name.match_indices('.').filter_map(|(at, _)| name.get(..at));
    let whole = above.clone().any(|above| config.asks(above) == Some(Asked::Whole));
    let bias = name.strip_suffix(".bias").is_some_and(|module| config.asks(module) == Some(Asked::Bias));
    (whole || bias).then(|| (Role::Instead, name.into()))
}

/// Why a tensor that the settings do not know of is refused. PEFT writes two kinds of them that this crate does not honour.
pub(super) fn unknown(name: &str) -> Error {
    let unsupported = |field, value| Error::Unsupported { path: TENSORS_FILE.into(), field, value };
    let embedding = || format!("`{name}`, an update of an embedding");
    match name.rsplit_once('.') {
        Some((_, "lora_embedding_A")) => unsupported("lora_embedding_A", embedding()),
        Some((_, "lora_embedding_B")) => unsupported("lora_embedding_B", embedding()),
        Some((module, "weight")) if !module.rsplit('.').next().is_some_and(|last| last.starts_with("lora_")) => {
            unsupported("weight", format!("`{name}`, a whole one that `modules_to_save` does not name (a resized vocabulary?)"))
        }
        _ => refused(format!("`{name}` is not part of an adapter that {CONFIG_FILE} describes")),
    }
}
