//! `config.json`: the shape of a model, under Hugging Face's names.

use std::path::Path;

use serde_json::{Map, Value};

use crate::{Error, Result};

/// The file of a model's settings, in its folder.
pub const CONFIG_FILE: &str = "config.json";

/// The families of models that this crate computes: one decoder, with what differs between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Llama, and SmolLM2, TinyLlama and others that call themselves so.
    Llama,
    /// Qwen2 and Qwen2.5: biases on q, k and v.
    Qwen2,
    /// Qwen3: norms of the heads of q and k.
    Qwen3,
}

/// How rotary positions are stretched beyond the length that the model was trained with.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Every frequency divided by a factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// Llama 3's: slow frequencies are divided by the factor, fast ones are not.
    Llama3 {
        /// `factor`
        factor: f64,
        /// `low_freq_factor`
        low: f64,
        /// `high_freq_factor`
        high: f64,
        /// `original_max_position_embeddings`
        original: f64,
    },
}

/// The shape of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// `model_type`
    pub family: Family,
    /// `vocab_size`
    pub vocab_size: usize,
    /// `hidden_size`
    pub hidden_size: usize,
    /// `intermediate_size`
    pub intermediate_size: usize,
    /// `num_hidden_layers`
    pub layers: usize,
    /// `num_attention_heads`
    pub heads: usize,
    /// `num_key_value_heads`
    pub kv_heads: usize,
    /// `head_dim`
    pub head_dim: usize,
    /// `max_position_embeddings`
    pub max_positions: usize,
    /// `rms_norm_eps`
    pub rms_norm_eps: f64,
    /// `rope_theta`
    pub rope_theta: f64,
    /// `rope_scaling`
    pub rope_scaling: Option<RopeScaling>,
    /// Whether q, k and v have biases.
    pub qkv_bias: bool,
    /// Whether the projection after attention has a bias.
    pub o_bias: bool,
    /// Whether the projections of the gate have biases: `mlp_bias`.
    pub mlp_bias: bool,
    /// `tie_word_embeddings`: the head is the embedding
    pub tied: bool,
    /// `bos_token_id`
    pub bos: Option<u32>,
    /// `eos_token_id`: any of these ends a text
    pub eos: Vec<u32>,
    /// The file as it was.
    pub(crate) document: Map<String, Value>,
}

impl ModelConfig {
    /// Reads `config.json` of a folder. Errors: [`Error::File`] for a file that is missing or damaged, a model that this crate does not
    /// compute, or a setting that it does not know how to honour.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(CONFIG_FILE);
        let bytes = std::fs::read(&path).map_err(|error| Error::file(&path, error))?;
        Self::from_json(&bytes).map_err(|error| match error {
            Error::File { problem, .. } => Error::File { path, problem },
            other => other,
        })
    }

    /// Reads the bytes of the file. Errors: those of [`read`](Self::read).
    pub fn from_json(bytes: &[u8]) -> Result<Self> {
        let document: Map<String, Value> = serde_json::from_slice(bytes).map_err(refused)?;
        let fields = Fields(&document);
        let family = fields.family()?;
        fields.refuse_unknown()?;
        let (hidden_size, heads) = (fields.count("hidden_size")?, fields.count("num_attention_heads")?);
        let head_dim = match (fields.optional_count("head_dim")?, family) {
            (Some(dim), _) => dim,
            (None, Family::Qwen3) => 128,
            (None, _) if hidden_size.is_multiple_of(heads) => hidden_size / heads,
            (None, _) => return Err(refused(format!("`hidden_size` is {hidden_size}, want a multiple of the {heads} heads"))),
        };
        let attention_bias = fields.flag("attention_bias", false)?;
        let rope = fields.rope()?;
        let config = Self {
            family,
            vocab_size: fields.count("vocab_size")?,
            hidden_size,
            intermediate_size: fields.count("intermediate_size")?,
            layers: fields.count("num_hidden_layers")?,
            heads,
            kv_heads: fields.optional_count("num_key_value_heads")?.unwrap_or(heads),
            head_dim,
            max_positions: fields.optional_count("max_position_embeddings")?.unwrap_or(if family == Family::Llama {
                2048
            } else {
                32_768
            }),
            rms_norm_eps: fields.number("rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta: rope.0,
            rope_scaling: rope.1,
            qkv_bias: attention_bias || family == Family::Qwen2,
            o_bias: attention_bias,
            mlp_bias: fields.flag("mlp_bias", false)?,
            tied: fields.flag("tie_word_embeddings", false)?,
            bos: fields.tokens("bos_token_id")?.first().copied(),
            eos: fields.tokens("eos_token_id")?,
            document: document.clone(),
        };
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<()> {
        let Self { heads, kv_heads, head_dim, .. } = *self;
        if !heads.is_multiple_of(kv_heads) {
            return Err(refused(format!("`num_key_value_heads` is {kv_heads}, want a divisor of {heads}")));
        }
        if !head_dim.is_multiple_of(2) {
            return Err(refused(format!("`head_dim` is {head_dim}, want an even number")));
        }
        Ok(())
    }
}

fn refused(reason: impl ToString) -> Error {
    Error::file(Path::new(CONFIG_FILE), reason)
}

/// The keys of the file.
struct Fields<'d>(&'d Map<String, Value>);

impl Fields<'_> {
    fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    fn wrong(name: &str, value: &Value, want: &str) -> Error {
        refused(format!("`{name}` is {value}, want {want}"))
    }

    fn family(&self) -> Result<Family> {
        const KNOWN: &str = "llama, qwen2 or qwen3";
        match self.get("model_type").and_then(Value::as_str) {
            Some("llama") => Ok(Family::Llama),
            Some("qwen2") => Ok(Family::Qwen2),
            Some("qwen3") => Ok(Family::Qwen3),
            Some(other) => Err(refused(format!("`model_type` is {other}, want {KNOWN}"))),
            None => Err(refused(format!("`model_type` is missing, want {KNOWN}"))),
        }
    }

    /// Errors: for settings that change what the model computes, and that this crate does not honour.
    fn refuse_unknown(&self) -> Result<()> {
        if let Some(value) = self.get("hidden_act").filter(|value| value.as_str() != Some("silu")) {
            return Err(Self::wrong("hidden_act", value, "\"silu\""));
        }
        if self.flag("use_sliding_window", false)? {
            return Err(refused("`use_sliding_window` is true, which is not supported"));
        }
        let sliding = self.get("layer_types").and_then(Value::as_array).into_iter().flatten();
        if let Some(other) = sliding.into_iter().find(|kind| kind.as_str() != Some("full_attention")) {
            return Err(refused(format!("`layer_types` has {other}, want \"full_attention\"")));
        }
        let set = ["quantization_config", "partial_rotary_factor"].into_iter().find(|name| self.get(name).is_some());
        set.map_or(Ok(()), |name| Err(refused(format!("`{name}` is set, which is not supported"))))
    }

    fn optional_count(&self, name: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let count = value.as_u64().filter(|count| (1..1 << 32).contains(count));
        count.map(|count| Some(count as usize)).ok_or_else(|| Self::wrong(name, value, "a whole number, at least 1"))
    }

    fn count(&self, name: &str) -> Result<usize> {
        self.optional_count(name)?.ok_or_else(|| refused(format!("`{name}` is missing")))
    }

    fn number(&self, name: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let number = value.as_f64().filter(|number| number.is_finite() && *number > 0.0);
        number.map(Some).ok_or_else(|| Self::wrong(name, value, "a positive number"))
    }

    fn flag(&self, name: &str, default: bool) -> Result<bool> {
        let Some(value) = self.get(name) else { return Ok(default) };
        value.as_bool().ok_or_else(|| Self::wrong(name, value, "true or false"))
    }

    /// One token or a list of them.
    fn tokens(&self, name: &str) -> Result<Vec<u32>> {
        let Some(value) = self.get(name) else { return Ok(Vec::new()) };
        let tokens = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice).iter();
        let token = |token: &Value| token.as_u64().and_then(|token| u32::try_from(token).ok());
        tokens.map(|one| token(one).ok_or_else(|| Self::wrong(name, value, "a token or a list of them"))).collect()
    }

    /// `rope_theta` and `rope_scaling`, or `rope_parameters`, which holds both since transformers 5.
    fn rope(&self) -> Result<(f64, Option<RopeScaling>)> {
        let nested = |name| match self.get(name) {
            None => Ok(None),
            Some(value) => value.as_object().map(Some).ok_or_else(|| Self::wrong(name, value, "an object")),
        };
        let (old, new) = (nested("rope_scaling")?, nested("rope_parameters")?);
        let theta = new.map(|new| Fields(new).number("rope_theta")).transpose()?.flatten();
        let theta = theta.or(self.number("rope_theta")?).unwrap_or(10_000.0);
        let scaling = new.or(old).map(|scaling| Fields(scaling).scaling()).transpose()?.flatten();
        Ok((theta, scaling))
    }

    fn scaling(&self) -> Result<Option<RopeScaling>> {
        let needed = |name| self.number(name)?.ok_or_else(|| refused(format!("`{name}` of `rope_scaling` is missing")));
        match self.get("rope_type").or(self.get("type")).and_then(Value::as_str) {
            None | Some("default") => Ok(None),
            Some("linear") => Ok(Some(RopeScaling::Linear { factor: needed("factor")? })),
            Some("llama3") => Ok(Some(RopeScaling::Llama3 {
                factor: needed("factor")?,
                low: needed("low_freq_factor")?,
                high: needed("high_freq_factor")?,
                original: needed("original_max_position_embeddings")?,
            })),
            Some(other) => Err(refused(format!("`rope_type` is {other}, want default, linear or llama3"))),
        }
    }
}
