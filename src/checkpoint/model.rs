//! What a model's `config.json` says of its weights, and what must be changed in the copy of it.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::element::DType;

/// What a model's config is called, beside its weights.
pub(super) const MODEL_CONFIG: &str = "config.json";
/// The element types, as such a config spells them.
const TORCH_NAMES: [(DType, &str); 3] = [(DType::F32, "float32"), (DType::F16, "float16"), (DType::BF16, "bfloat16")];
/// What a config says of quantised weights under.
const QUANTISATION: &str = "quantization_config";
/// Whether the head of a model multiplies with its embedding.
const TIED: &str = "tie_word_embeddings";

/// The config of a model, and those of its parts, such as `text_config`.
#[derive(Debug)]
pub(super) struct ModelConfig(Map<String, Value>);

impl ModelConfig {
    /// That of the model in a folder; `None` if there is none that can be read.
    pub(super) fn read(folder: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(folder.join(MODEL_CONFIG)).ok()?).ok().map(Self)
    }

    /// What it and its parts say under a key, the whole first.
    fn all<'k>(&'k self, key: &'k str) -> impl Iterator<Item = &'k Value> {
        let parts = self.0.iter().filter(|(name, _)| is_part(name)).filter_map(|(_, part)| part.as_object());
        std::iter::once(&self.0).chain(parts).filter_map(move |config| config.get(key))
    }

    /// `model_type`, of the whole and of its parts.
    pub(super) fn model_types(&self) -> impl Iterator<Item = &str> {
        self.all("model_type").filter_map(Value::as_str)
    }

    /// `architectures`: the class of the model.
    pub(super) fn architecture(&self) -> Option<&str> {
        self.0.get("architectures")?.get(0)?.as_str()
    }

    /// `tie_word_embeddings`. The whole counts before its parts.
    pub(super) fn ties(&self) -> Option<bool> {
        self.all(TIED).find_map(Value::as_bool)
    }
}

fn is_part(key: &str) -> bool {
    key.ends_with("_config") && key != "quantization_config" // that one speaks of how others store and compute
        || ["encoder", "decoder", "text", "vision", "audio"].contains(&key)
}

/// What the copy of a config is to say.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct ConfigEdit {
    /// Weights are stored so. transformers loads weights in the type that the config names, which would undo what was asked for.
    pub(super) dtype: Option<DType>,
    /// The head has a weight of its own.
    pub(super) untie: bool,
    /// How the weights are quantised now; `Some(None)` if they no longer are.
    pub(super) quantisation: Option<Option<Value>>,
    /// The number of tokens there was, and the one there is.
    pub(super) vocabulary: Option<[usize; 2]>,
}

impl ConfigEdit {
    /// The bytes of the new config; `None` if the old one says it already, or is none.
    pub(super) fn apply(&self, bytes: &[u8]) -> Option<Vec<u8>> {
        let mut document: Map<String, Value> = serde_json::from_slice(bytes).ok()?;
        let mut changed = self.edit(&mut document);
        if self.untie && document.get(TIED) != Some(&json!(false)) {
            document.insert(TIED.into(), json!(false)); // absent, it is true for many models
            changed = true;
        }
        if let Some(quantisation) = &self.quantisation {
            changed |= document.get(QUANTISATION) != quantisation.as_ref();
            match quantisation {
                Some(new) => drop(document.insert(QUANTISATION.into(), new.clone())),
                None => drop(document.shift_remove(QUANTISATION)),
            }
        }
        changed.then(|| format!("{:#}\n", Value::Object(document)).into_bytes())
    }

    /// In a config and those of its parts. Says whether something changed.
    fn edit(&self, config: &mut Map<String, Value>) -> bool {
        let mut changed = false;
        for (key, value) in config {
            let new = match (key.as_str(), &value) {
                ("torch_dtype" | "dtype", Value::String(there)) => self.dtype.and_then(|dtype| {
                    let known = TORCH_NAMES.iter().any(|(_, name)| there == name);
                    TORCH_NAMES.iter().find(|(named, _)| *named == dtype).filter(|_| known).map(|(_, name)| json!(name))
                }),
                (TIED, Value::Bool(true)) if self.untie => Some(json!(false)),
                ("vocab_size", Value::Number(there)) => {
                    self.vocabulary.filter(|[from, _]| there.as_u64() == Some(*from as u64)).map(|[_, to]| json!(to))
                }
                _ => None,
            };
            match (new, value) {
                (Some(new), value) if *value != new => {
                    *value = new;
                    changed = true;
                }
                (None, Value::Object(part)) if is_part(key) => changed |= self.edit(part),
                _ => {}
            }
        }
        changed
    }
}
