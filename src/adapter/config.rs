//! `adapter_config.json`: the settings of an adapter, under PEFT's names.

use regex::{Regex, RegexBuilder};
use serde_json::{Map, Value, json};

use super::CONFIG_FILE;
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::nn::{Init, Layer, LoraConfig, Mlp, Scaling};

/// What a config may hold but not set: each changes what an adapter computes, in a way that this crate does not.
const UNSUPPORTED: [&str; 24] = [
    "alora_invocation_tokens",
    "arrow_config",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_bias",
    "lora_ga_config",
    "megatron_config",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
];

/// The settings in an `adapter_config.json`.
///
/// It remembers the file as it was: keys that this crate does not know, and the order of all, are written again.
#[derive(Clone, Debug)]
pub struct AdapterConfig {
    document: Map<String, Value>,
    target_modules: Modules,
    r: usize,
    lora_alpha: f64,
    rank_pattern: Vec<(Regex, usize)>,
    alpha_pattern: Vec<(Regex, f64)>,
    use_rslora: bool,
    lora_dropout: f32,
    gaussian: bool,
}

/// Which modules a config names.
#[derive(Clone, Debug)]
enum Modules {
    AllLinear,
    Names(Vec<String>),
    Matching(Regex),
}

impl Modules {
    fn include(&self, layer: &str) -> bool {
        match self {
            Modules::AllLinear => true,
            Modules::Names(names) => names.iter().any(|name| {
                let above = layer.strip_suffix(name.as_str());
                above.is_some_and(|above| above.is_empty() || above.ends_with('.'))
            }),
            Modules::Matching(regex) => regex.is_match(layer),
        }
    }
}

impl AdapterConfig {
    /// Reads the bytes of a file; `peft_type` and `target_modules` are the least it must hold.
    ///
    /// Errors: [`Error::File`] for what is not such a file or has a setting outside its range; [`Error::Unsupported`] for a
    /// setting that this crate does not know how to honour.
    pub fn from_json(bytes: &[u8]) -> Result<Self> {
        Self::from_document(serde_json::from_slice(bytes).map_err(|error| refused(error.to_string()))?)
    }

    /// The settings of a model's adapters, beside PEFT's defaults. Errors: [`Error::Value`] if it has none, or such as no
    /// config can tell.
    pub fn of<B: Backend>(model: &Mlp<B>) -> Result<Self> {
        Self::describing(model, peft_defaults())
    }

    /// The same config if it tells what adapters the model has, else one that does, with every other key kept.
    pub fn updated<B: Backend>(&self, model: &Mlp<B>) -> Result<Self> {
        match self.misdescribed(model) {
            None => Ok(self.clone()),
            Some(_) => Self::describing(model, self.document.clone()),
        }
    }

    /// As PEFT writes it: two spaces of indent, nothing after the last brace.
    pub fn to_json(&self) -> String {
        format!("{:#}", Value::Object(self.document.clone()))
    }

    /// What the config asks for a layer of this name; `None` if it is not a target.
    pub fn lora_config(&self, layer: &str) -> Option<LoraConfig> {
        if !self.target_modules.include(layer) {
            return None;
        }
        let rank = first_match(&self.rank_pattern, layer).unwrap_or(self.r);
        let lora_alpha = first_match(&self.alpha_pattern, layer).unwrap_or(self.lora_alpha);
        let (alpha, scaling) = match (lora_alpha as f32, self.use_rslora) {
            (alpha, true) if f64::from(alpha) == lora_alpha => (alpha, Scaling::AlphaOverSqrtRank),
            (alpha, false) if f64::from(alpha) == lora_alpha => (alpha, Scaling::AlphaOverRank),
            // An alpha that f32 does not hold: divided before it is rounded, as PEFT does, and as a raw alpha comes back.
            (_, true) => ((lora_alpha / (rank as f64).sqrt()) as f32, Scaling::Raw),
            (_, false) => ((lora_alpha / rank as f64) as f32, Scaling::Raw),
        };
        let init = if self.gaussian { Init::Gaussian { std: 1.0 / rank as f32 } } else { Init::KaimingUniform };
        Some(LoraConfig { rank, alpha, scaling, dropout: self.lora_dropout, init })
    }

    /// What the file says under a key that this crate knows or does not know.
    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.document.get(key)
    }

    /// PEFT's defaults, with these settings. Errors: those of [`from_json`](Self::from_json).
    pub(super) fn new(settings: impl IntoIterator<Item = (&'static str, Value)>) -> Result<Self> {
        let mut document = peft_defaults();
        document.extend(settings.into_iter().map(|(key, value)| (key.to_string(), value)));
        Self::from_document(document)
    }

    /// The same config with these settings in place of its own. Errors: those of [`from_json`](Self::from_json).
    pub(super) fn with(&self, settings: impl IntoIterator<Item = (&'static str, Value)>) -> Result<Self> {
        let mut document = self.document.clone();
        document.extend(settings.into_iter().map(|(key, value)| (key.to_string(), value)));
        Self::from_document(document)
    }

    fn from_document(document: Map<String, Value>) -> Result<Self> {
        let fields = Fields(&document);
        fields.refuse_unsupported()?;
        Ok(Self {
            target_modules: fields.target_modules()?,
            r: fields.read("r", RANK, rank)?.unwrap_or(8),
            lora_alpha: fields.read("lora_alpha", "a number", Value::as_f64)?.unwrap_or(8.0),
            rank_pattern: fields.pattern("rank_pattern", RANK, rank)?,
            alpha_pattern: fields.pattern("alpha_pattern", "a number", Value::as_f64)?,
            use_rslora: fields.read("use_rslora", "true or false", Value::as_bool)?.unwrap_or(false),
            lora_dropout: fields.read("lora_dropout", "at least 0 and below 1", dropout)?.unwrap_or(0.0),
            gaussian: fields.gaussian()?,
            document,
        })
    }

    fn describing<B: Backend>(model: &Mlp<B>, mut document: Map<String, Value>) -> Result<Self> {
        let adapters: Vec<(&str, &LoraConfig)> =
            model.layers().filter_map(|(name, layer)| Some((name, layer.lora()?.adapter().config()))).collect();
        let Some(&(_, first)) = adapters.first() else {
            return Err(unsaid("no adapter".into(), "at least one adapter"));
        };
        let use_rslora = adapters.iter().all(|(_, config)| config.scaling == Scaling::AlphaOverSqrtRank);
        let rank = |config: &LoraConfig| json!(config.rank);
        let alpha = |config: &LoraConfig| number(lora_alpha(config, use_rslora));
        let gaussian = matches!(first.init, Init::Gaussian { .. });
        let settings = [
            ("alpha_pattern", exceptions(&adapters, alpha)),
            ("init_lora_weights", if gaussian { json!("gaussian") } else { json!(true) }),
            ("lora_alpha", alpha(first)),
            ("lora_dropout", json!(shortest(first.dropout))),
            ("r", rank(first)),
            ("rank_pattern", exceptions(&adapters, rank)),
            ("target_modules", adapters.iter().map(|(name, _)| *name).collect()),
            ("use_rslora", json!(use_rslora)),
        ];
        document.extend(settings.map(|(key, value)| (key.to_string(), value)));
        let config = Self::from_document(document)?;
        match config.misdescribed(model) {
            None => Ok(config),
            Some(layer) => Err(unsaid(format!("`{layer}` with settings of its own"), "one `lora_dropout` for all layers")),
        }
    }

    /// The first layer for which the config tells something else than the model has: rank, scaling or dropout.
    fn misdescribed<'m, B: Backend>(&self, model: &'m Mlp<B>) -> Option<&'m str> {
        let effect = |config: &LoraConfig| (config.rank, config.scaling.of(config.alpha, config.rank), config.dropout);
        let has = |layer: &Layer<B>| layer.lora().map(|lora| effect(lora.adapter().config()));
        let mut layers = model.layers();
        layers.find(|(name, layer)| self.lora_config(name).as_ref().map(effect) != has(layer)).map(|(name, _)| name)
    }
}

/// The layers whose setting is not that of the first one, which stands for all others.
fn exceptions(adapters: &[(&str, &LoraConfig)], setting: impl Fn(&LoraConfig) -> Value) -> Value {
    let usual = adapters.first().map(|(_, config)| setting(config));
    let settings = adapters.iter().map(|(name, config)| (name.to_string(), setting(config)));
    Value::Object(settings.filter(|(_, setting)| Some(setting) != usual.as_ref()).collect())
}

/// The `lora_alpha` that comes to the scaling of an adapter: exactly, because f64 holds any f32 times a rank.
fn lora_alpha(config: &LoraConfig, use_rslora: bool) -> f64 {
    match config.scaling {
        Scaling::AlphaOverRank => f64::from(config.alpha),
        Scaling::AlphaOverSqrtRank if use_rslora => f64::from(config.alpha),
        scaling => f64::from(scaling.of(config.alpha, config.rank)) * config.rank as f64,
    }
}

/// The keys of a file and what they may hold. An absent key and `null` are the same: the default.
struct Fields<'d>(&'d Map<String, Value>);

const RANK: &str = "a whole number above 0";

impl Fields<'_> {
    fn read<T>(&self, key: &str, want: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>> {
        let value = self.0.get(key).filter(|value| !value.is_null());
        value.map(|value| read(value).ok_or_else(|| wrong(key, value, want))).transpose()
    }

    fn refuse_unsupported(&self) -> Result<()> {
        self.read("peft_type", "\"LORA\"", |value| (value == "LORA").then_some(()))?
            .ok_or_else(|| refused("`peft_type` is missing, want \"LORA\"".into()))?;
        let set =
            UNSUPPORTED.iter().find_map(|&field| self.0.get(field).filter(|value| is_set(value)).map(|value| (field, value)));
        match set {
            Some((field, value)) => Err(unsupported(field, value)),
            None => Ok(()),
        }
    }

    fn target_modules(&self) -> Result<Modules> {
        const KEY: &str = "target_modules";
        let modules = self.read(KEY, "a list of names, or a string", |value| match value {
            Value::String(all) if all.eq_ignore_ascii_case("all-linear") => Some(Ok(Modules::AllLinear)),
            Value::String(pattern) => Some(regex(KEY, &format!(r"\A(?:{pattern})\z")).map(Modules::Matching)),
            Value::Array(names) => names
                .iter()
                .map(|name| name.as_str().map(String::from))
                .collect::<Option<_>>()
                .map(|names| Ok(Modules::Names(names))),
            _ => None,
        })?;
        modules.unwrap_or_else(|| Err(refused(format!("`{KEY}` is missing, want a list of names, or a string"))))
    }

    /// `rank_pattern` and `alpha_pattern`: regular expressions for the ends of module names, in the order they are tried.
    fn pattern<T>(&self, key: &str, want: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Vec<(Regex, T)>> {
        let entries = self.read(key, "an object", |value| value.as_object().cloned())?.unwrap_or_default();
        let entry = |(name, value): (&String, &Value)| {
            let value = read(value).ok_or_else(|| wrong(&format!("{key}.{name}"), value, want))?;
            Ok((regex(key, &format!(r"\A(?:(.*\.)?({name})$)"))?, value))
        };
        entries.iter().map(entry).collect()
    }

    /// Initialisations that change the base weights, such as `pissa`, would have to be repeated before loading.
    fn gaussian(&self) -> Result<bool> {
        match self.0.get("init_lora_weights") {
            None | Some(Value::Null | Value::Bool(_)) => Ok(false),
            Some(Value::String(name)) if name.eq_ignore_ascii_case("gaussian") => Ok(true),
            Some(other) => Err(unsupported("init_lora_weights", other)),
        }
    }
}

fn rank(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|rank| usize::try_from(rank).ok()).filter(|&rank| rank > 0)
}

fn dropout(value: &Value) -> Option<f32> {
    value.as_f64().map(|p| p as f32).filter(|p| (0.0..1.0).contains(p))
}

pub(super) fn is_set(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(items) => !items.is_empty(),
        Value::Object(entries) => !entries.is_empty(),
        Value::String(text) => !text.is_empty() && text != "none",
        Value::Bool(true) | Value::Number(_) => true,
    }
}

fn first_match<T: Copy>(pattern: &[(Regex, T)], layer: &str) -> Option<T> {
    pattern.iter().find(|(regex, _)| regex.is_match(layer)).map(|&(_, value)| value)
}

/// A pattern in the syntax that Python's `re` and the regex crate share. The limit keeps a hostile one small.
fn regex(key: &str, pattern: &str) -> Result<Regex> {
    let built = RegexBuilder::new(pattern).size_limit(1 << 20).build();
    built.map_err(|_| refused(format!("`{key}` holds {}, want a regular expression without look-around", brief(pattern))))
}

/// `8`, not `8.0`, where it is whole: PEFT's alphas mostly are.
fn number(value: f64) -> Value {
    let whole = value as i64;
    if whole as f64 == value { json!(whole) } else { json!(value) }
}

/// The shortest decimal that is this number as `f32`: 0.1, not 0.10000000149011612.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

/// What is wrong with the file, before it is known where it lies.
pub(super) fn refused(reason: String) -> Error {
    Error::File { path: CONFIG_FILE.into(), reason }
}

fn wrong(key: &str, value: &Value, want: &str) -> Error {
    refused(format!("`{key}` is {}, want {want}", brief(&value.to_string())))
}

pub(super) fn unsupported(field: &'static str, value: &Value) -> Error {
    Error::Unsupported { path: CONFIG_FILE.into(), field, value: brief(&value.to_string()) }
}

fn unsaid(got: String, want: &'static str) -> Error {
    Error::Value { verb: "save", name: "model", got, want }
}

/// As much of a hostile value as a message can bear.
fn brief(text: &str) -> String {
    const LONGEST: usize = 60;
    let mut brief: String = text.chars().take(LONGEST).collect();
    if brief.len() < text.len() {
        brief.push('…');
    }
    brief
}

/// Every key that PEFT 0.21 writes, sorted, at its default.
fn peft_defaults() -> Map<String, Value> {
    let defaults = json!({
        "alora_invocation_tokens": null,
        "alpha_pattern": {},
        "arrow_config": null,
        "auto_mapping": null,
        "base_model_name_or_path": null,
        "bias": "none",
        "corda_config": null,
        "ensure_weight_tying": false,
        "eva_config": null,
        "exclude_modules": null,
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "kasa_config": null,
        "layer_replication": null,
        "layers_pattern": null,
        "layers_to_transform": null,
        "loftq_config": {},
        "lora_alpha": 8,
        "lora_bias": false,
        "lora_dropout": 0.0,
        "lora_ga_config": null,
        "megatron_config": null,
        "megatron_core": "megatron.core",
        "modules_to_save": null,
        "monteclora_config": null,
        "peft_type": "LORA",
        "peft_version": "0.21.2",
        "qalora_group_size": 16,
        "r": 8,
        "rank_pattern": {},
        "revision": null,
        "target_modules": null,
        "target_parameters": null,
        "task_type": null,
        "trainable_token_indices": null,
        "use_bdlora": null,
        "use_dora": false,
        "use_qalora": false,
        "use_rslora": false,
        "velora_config": null,
    });
    match defaults {
        Value::Object(defaults) => defaults,
        _ => Map::new(), // it is an object, as written above
    }
}
