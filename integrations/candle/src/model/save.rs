//! A model written as a folder that transformers opens.

use std::collections::HashMap;
use std::path::Path;

use candle_core::DType;
use lowrank::file::{Staged, write_whole};
use serde_json::{Value, json};

use super::CausalLm;
use super::files::WHOLE;
use crate::config::CONFIG_FILE;
use crate::{Adaptable, Error, Result};

/// What goes with a model, copied as it is where it is there.
const BESIDE: [&str; 9] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
];

impl CausalLm {
    /// Writes the base model, with what is merged into it, as Hugging Face's folder: `config.json`, `model.safetensors`, and the files of
    /// tokenizer and template where the model was read from a folder that has them.
    ///
    /// Errors: for a model that has adapters (merge them first: [`Adaptable::merge_and_unload`]), for the folder that the model was read
    /// from, and files that cannot be written.
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<()> {
        let dir = dir.as_ref();
        let names = self.adapter_names();
        Error::unless(names.is_empty(), "adapters", names.join(", "), "none: merge them with `merge_and_unload`, or save them")?;
        std::fs::create_dir_all(dir).map_err(|error| Error::file(dir, error))?;
        if let Some(from) = &self.dir {
            let same = from.canonicalize().ok() == dir.canonicalize().ok();
            Error::unless(!same, "dir", dir.display(), "another folder than the model was read from")?;
        }
        let tensors: HashMap<String, _> = self.tensors().into_iter().collect();
        let format = Some([("format".to_string(), "pt".to_string())].into());
        let path = dir.join(WHOLE);
        let staged = Staged::new(&path, &safetensors::serialize(tensors, format).map_err(|error| Error::file(&path, error))?)?;
        for name in BESIDE {
            let from = self.dir.as_ref().map(|from| from.join(name)).filter(|from| from.is_file());
            from.map_or(Ok(0), |from| std::fs::copy(&from, dir.join(name)).map_err(|error| Error::file(&from, error)))?;
        }
        let config = format!("{:#}\n", Value::Object(self.document()));
        write_whole(&dir.join(CONFIG_FILE), config.as_bytes())?;
        Ok(staged.publish()?)
    }

    /// `config.json`, of the type that the weights have now.
    fn document(&self) -> serde_json::Map<String, Value> {
        let mut document = self.config.document.clone();
        let dtype = match self.dtype() {
            DType::F16 => "float16",
            DType::BF16 => "bfloat16",
            _ => "float32",
        };
        let key = if document.contains_key("dtype") { "dtype" } else { "torch_dtype" };
        document.insert(key.into(), json!(dtype));
        document
    }
}
