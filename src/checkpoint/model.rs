//! Reading a model's `config.json`, and editing the copy of it.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::element::DType;

/// The file name of a model's config.
pub(super) const MODEL_CONFIG: &str = "config.json";
/// The names of element types in such a config.
const TORCH_NAMES: [(DType, &str); 3] = [(DType::F32, "float32"), (DType::F16, "float16"), (DType::BF16, "bfloat16")];
/// The key that says whether the output head shares the weight of the embedding.
const TIED: &str = "tie_word_embeddings";

/// The config of a model, including those of its parts, such as `text_config`.
#[derive(Debug)]
pub(super) struct ModelConfig(Map<String, Value>);

impl ModelConfig {
    /// Reads the config of a folder; `None` if there is none or it cannot be read.
    pub(super) fn read(folder: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(folder.join(MODEL_CONFIG)).ok()?).ok().map(Self)
    }

    /// The values of a key in the config and in those of its parts, the config itself first.
    fn all<'k>(&'k self, key: &'k str) -> impl Iterator<Item = &'k Value> {
        let parts = self.0.iter().filter(|(name, _)| is_part(name)).filter_map(|(_, part)| part.as_object());
        std::iter::once(&self.0).chain(parts).filter_map(move |config| config.get(key))
    }

    /// `model_type`, of the model and of its parts.
    pub(super) fn model_types(&self) -> impl Iterator<Item = &str> {
        self.all("model_type").filter_map(Value::as_str)
    }

    /// `architectures`: the class of the model.
    pub(super) fn architecture(&self) -> Option<&str> {
        self.0.get("architectures")?.get(0)?.as_str()
    }

    /// `tie_word_embeddings` of the model, or else of a part.
    pub(super) fn ties(&self) -> Option<bool> {
        self.all(TIED).find_map(Value::as_bool)
    }
}

fn is_part(key: &str) -> bool {
    key.ends_with("_config") && key != "quantization_config" // describes the format of weights, not a part of the model
        || ["encoder", "decoder", "text", "vision", "audio"].contains(&key)
}

/// The edits of a copied config.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct ConfigEdit {
    /// The new element type of the weights. It must be in the config, because transformers converts weights to the type named there.
    pub(super) dtype: Option<DType>,
    /// If true, the output head has a weight of its own now.
    pub(super) untie: bool,
    /// The old and the new number of tokens.
    pub(super) vocabulary: Option<[usize; 2]>,
}

impl ConfigEdit {
    /// The bytes of the edited config; `None` if nothing changes, or if the bytes are not a JSON object.
    pub(super) fn apply(&self, bytes: &[u8]) -> Option<Vec<u8>> {
        let mut document: Map<String, Value> = serde_json::from_slice(bytes).ok()?;
        let mut changed = self.edit(&mut document);
        if self.untie && document.get(TIED) != Some(&json!(false)) {
            document.insert(TIED.into(), json!(false)); // the default is true for many models
            changed = true;
        }
        changed.then(|| format!("{:#}\n", Value::Object(document)).into_bytes())
    }

    /// Edits a config and those of its parts. Returns true if something changed.
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
