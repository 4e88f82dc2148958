//! Normalises the names of tensors in files to the spelling that PEFT writes.
//!
//! | found | written |
//! |---|---|
//! | `base_model.model.base_model.model.x.lora_A.weight` | `x.lora_A.weight` |
//! | `module.base_model.model.x.…`, `_orig_mod.x.…`, `x._fsdp_wrapped_module.…` | `x.…` |
//! | `x.lora_A.default.weight`, `x.lora_embedding_A.default` | `x.lora_A.weight`, `x.lora_embedding_A` |
//! | `x.lora_magnitude_vector.weight`, `x.lora_magnitude_vector.default.weight` | `x.lora_magnitude_vector` |
//! | `x.modules_to_save.default.weight` | `x.weight` |
//! | `x.token_adapter.base_layer.weight` | `x.base_layer.weight` |
//! | `x.original_module.weight`, `x.token_adapter.trainable_tokens_original.default` | dropped: not part of the adapter |

use std::collections::BTreeMap;

use super::HostTensors;
use super::tensors::{PREFIX, refused};
use crate::error::Result;

/// Components that wrappers of models (torch.compile, FSDP, activation checkpointing) insert into the names of modules.
const WRAPPERS: [&str; 3] = ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"];

/// The tensors with their names in PEFT's spelling. Errors: [`Error::File`](crate::Error::File) if two tensors get one name, as in a
/// file with two adapters.
pub(super) fn normalised(tensors: HostTensors) -> Result<HostTensors> {
    let mut found: BTreeMap<String, String> = BTreeMap::new();
    let mut written = HostTensors::new();
    for (name, tensor) in tensors {
        let Some(short) = normalise(&name) else { continue };
        if let Some(other) = found.insert(short.clone(), name.clone()) {
            return Err(refused(format!("`{other}` and `{name}` are both `{short}`: want one adapter in a file")));
        }
        written.insert(short, tensor);
    }
    Ok(written)
}

/// A name in PEFT's spelling; `None` for a tensor that is not part of the adapter.
fn normalise(name: &str) -> Option<String> {
    let mut rest = name;
    loop {
        let wrapped = rest.strip_prefix("module.").filter(|rest| rest.starts_with("base_model."));
        rest = match wrapped.or_else(|| rest.strip_prefix(PREFIX)) {
            Some(rest) => rest,
            None => break,
        };
    }
    let parts: Vec<&str> = rest.split('.').filter(|part| !WRAPPERS.contains(part)).collect();
    if parts.iter().any(|part| ["original_module", "trainable_tokens_original"].contains(part)) {
        return None;
    }
    let rest = match parts.as_slice() {
        [module @ .., "modules_to_save", _, tensor @ ("weight" | "bias")] => [module, &[*tensor]].concat(),
        [module @ .., factor @ ("lora_A" | "lora_B"), _, tensor @ ("weight" | "bias")] => [module, &[*factor, *tensor]].concat(),
        [module @ .., factor @ ("lora_embedding_A" | "lora_embedding_B" | "trainable_tokens_delta"), _] => {
            [module, &[*factor]].concat()
        }
        [module @ .., vector @ "lora_magnitude_vector", _] | [module @ .., vector @ "lora_magnitude_vector", _, "weight"] => {
            [module, &[*vector]].concat()
        }
        [module @ .., "token_adapter", "base_layer", tensor] => [module, &["base_layer", *tensor]].concat(),
        _ => parts,
    };
    Some(rest.join("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_is_normalised() {
        for (found, written) in [
            ("x.lora_A.weight", Some("x.lora_A.weight")),
            ("x.lora_B.second.bias", Some("x.lora_B.bias")),
            ("base_model.model.base_model.model.x.lora_A.weight", Some("x.lora_A.weight")),
            ("module.base_model.model.x.lora_A.default.weight", Some("x.lora_A.weight")),
            ("_orig_mod.x._fsdp_wrapped_module.y.lora_B.weight", Some("x.y.lora_B.weight")),
            ("x.lora_embedding_B.default", Some("x.lora_embedding_B")),
            ("x.lora_magnitude_vector", Some("x.lora_magnitude_vector")),
            ("x.lora_magnitude_vector.weight", Some("x.lora_magnitude_vector")),
            ("x.lora_magnitude_vector.default.weight", Some("x.lora_magnitude_vector")),
            ("x.lora_magnitude_vector.default", Some("x.lora_magnitude_vector")),
            ("x.modules_to_save.default.weight", Some("x.weight")),
            ("x.token_adapter.trainable_tokens_delta", Some("x.token_adapter.trainable_tokens_delta")),
            ("x.token_adapter.base_layer.weight", Some("x.base_layer.weight")),
            ("x.original_module.weight", None),
            ("module.x.lora_A.weight", Some("module.x.lora_A.weight")),
        ] {
            assert_eq!(normalise(found).as_deref(), written, "{found}");
        }
    }
}
