//! Reading and checking the keys of an `adapter_config.json`.

use serde_json::{Map, Value, json};

use super::CONFIG_FILE;
use super::modules::{Layers, Modules, Saved, Selection};
use super::pattern::Pattern;
use crate::error::{Error, Result};
use crate::nn::{Bias, Init};

/// Keys that must not be set, because each changes what an adapter computes in a way that this crate does not support.
const UNSUPPORTED: [&str; 12] = [
    "alora_invocation_tokens",
    "arrow_config",
    "corda_config",
    "kasa_config",
    "layer_replication",
    "loftq_config",
    "lora_ga_config",
    "megatron_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
];

/// Typed access to the keys of a file. An absent key and `null` both mean the default.
pub(super) struct Fields<'d>(pub(super) &'d Map<String, Value>);

pub(super) const RANK: &str = "a whole number above 0";

impl Fields<'_> {
    pub(super) fn read<T>(&self, key: &str, want: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>> {
        let value = self.0.get(key).filter(|value| !value.is_null());
        value.map(|value| read(value).ok_or_else(|| wrong(key, value, want))).transpose()
    }

    pub(super) fn refuse_unsupported(&self) -> Result<()> {
        self.read("peft_type", "\"LORA\"", |value| (value == "LORA").then_some(()))?
            .ok_or_else(|| refused("`peft_type` is missing, want \"LORA\"".into()))?;
        let set =
            UNSUPPORTED.iter().find_map(|&field| self.0.get(field).filter(|value| is_set(value)).map(|value| (field, value)));
        match set {
            Some((field, value)) => Err(unsupported(field, value)),
            None => self.refuse_unknown(),
        }
    }

    /// Refuses unknown keys, of later versions of PEFT or of other programs, that enable something. PEFT enables each new feature by a
    /// flag, a list or an object, which is off by default, so one that is set changes what the adapter computes. Numbers and strings
    /// are only details of a feature or of the training; they are accepted and kept.
    fn refuse_unknown(&self) -> Result<()> {
        let known = peft_defaults();
        let on = |value: &Value| switches(value) && !value.is_number() && !value.is_string();
        match self.0.iter().find(|(key, value)| !known.contains_key(*key) && on(value)) {
            Some((key, value)) => {
                let (key, value) = (brief(key), brief(&value.to_string()));
                Err(refused(format!("`{key}` is {value}, and no such setting is known to this version")))
            }
            None => Ok(()),
        }
    }

    /// `target_modules` and the keys that refine it.
    pub(super) fn selection(&self) -> Result<Selection> {
        const KEY: &str = "target_modules";
        let parameters = !self.target_parameters()?.is_empty();
        let Some(targets) = self.modules(KEY)?.or_else(|| parameters.then(|| Modules::Names(Vec::new()))) else {
            return Err(refused(format!("`{KEY}` is missing, want a list of names, or a string")));
        };
        let saved = self.read("modules_to_save", "a list of names", names)?.unwrap_or_default().into_iter().map(|name| {
            let within = Pattern::new("modules_to_save", [r"\A(?:^|.*\.)(?:", &name, r")(?:$|\..*)"])?;
            Ok(Saved { name, within })
        });
        let saved = saved.collect::<Result<_>>()?;
        let excluded = self.modules("exclude_modules")?;
        Ok(Selection { layers: self.layers(&targets)?, targets, excluded, saved })
    }

    /// A list of names (matched at the end), a regular expression for full names, or `all-linear`.
    fn modules(&self, key: &str) -> Result<Option<Modules>> {
        let modules = self.read(key, "a list of names, or a string", |value| match value {
            Value::String(all) if key == "target_modules" && all.eq_ignore_ascii_case("all-linear") => {
                Some(Ok(Modules::AllLinear))
            }
            Value::String(pattern) => Some(Pattern::new(key, [r"\A(?:", pattern, r")\z"]).map(Modules::Matching)),
            value => names(value).map(|names| Ok(Modules::Names(names))),
        })?;
        modules.transpose()
    }

    /// `layers_to_transform`. The number of a layer is found by `layers_pattern`, or else is the first number between dots in its name.
    /// PEFT accepts both keys only together with a list as `target_modules`.
    fn layers(&self, targets: &Modules) -> Result<Option<Layers>> {
        let numbers = self.read("layers_to_transform", "a layer's number, or a list of them", |value| match value {
            Value::Array(numbers) => numbers.iter().map(Value::as_u64).collect(),
            value => value.as_u64().map(|number| vec![number]),
        })?;
        let patterns = self.read("layers_pattern", "a name, or a list of names", |value| match value {
            Value::String(pattern) if pattern.is_empty() => Some(Vec::new()),
            Value::String(pattern) => Some(vec![pattern.clone()]),
            value => names(value),
        })?;
        let patterns = patterns.filter(|patterns| !patterns.is_empty());
        let by_name = matches!(targets, Modules::Names(_));
        for (key, set) in [("layers_to_transform", numbers.is_some()), ("layers_pattern", patterns.is_some())] {
            if set && !by_name {
                return Err(refused(format!("`{key}` is set, want a list of names in `target_modules` beside it")));
            }
        }
        let Some(numbers) = numbers.filter(|numbers| !numbers.is_empty()) else {
            return match patterns {
                Some(_) => Err(refused("`layers_pattern` is set, want `layers_to_transform` beside it".into())),
                None => Ok(None),
            };
        };
        let patterns = match patterns {
            None => vec![Pattern::new("layers_pattern", [r"\A.*?\.", "[^.]*", r"\.(?P<idx>[0-9]+)\."])?],
            Some(patterns) => {
                let pattern =
                    |name: &String| Pattern::new("layers_pattern", [r"\A(?:^|.*?\.)(?:", name, r")\.(?P<idx>[0-9]+)\."]);
                patterns.iter().map(pattern).collect::<Result<_>>()?
            }
        };
        Ok(Some(Layers { numbers, patterns }))
    }

    /// `target_parameters`: the ends of the names of parameters.
    pub(super) fn target_parameters(&self) -> Result<Vec<String>> {
        Ok(self.read("target_parameters", "a list of names", names)?.unwrap_or_default())
    }

    /// `trainable_token_indices`: rows of the embedding (no name), or of named layers.
    pub(super) fn tokens(&self) -> Result<Vec<(Option<String>, Vec<usize>)>> {
        let rows = |value: &Value| -> Option<Vec<usize>> {
            value.as_array()?.iter().map(|row| usize::try_from(row.as_u64()?).ok()).collect()
        };
        let want = "a list of whole numbers, or an object of them";
        let tokens = self.read("trainable_token_indices", want, |value| match value {
            Value::Object(layers) => {
                layers.iter().map(|(layer, value)| Some((Some(layer.clone()), rows(value)?))).collect::<Option<Vec<_>>>()
            }
            value => Some(vec![(None, rows(value)?)]),
        })?;
        Ok(tokens.unwrap_or_default())
    }

    /// `bias`: which biases are part of the adapter.
    pub(super) fn bias(&self) -> Result<Bias> {
        let bias = self.read("bias", "\"none\", \"all\" or \"lora_only\"", |value| match value.as_str() {
            Some("none" | "") => Some(Bias::None),
            Some("all") => Some(Bias::All),
            Some("lora_only") => Some(Bias::LoraOnly),
            _ => None,
        })?;
        Ok(bias.unwrap_or_default())
    }

    pub(super) fn flag(&self, key: &str) -> Result<bool> {
        Ok(self.read(key, "true or false", Value::as_bool)?.unwrap_or(false))
    }

    /// `rank_pattern` and `alpha_pattern`: regular expressions for the ends of module names, in the order in which they are tried.
    pub(super) fn pattern<T>(&self, key: &str, want: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Vec<(Pattern, T)>> {
        let entries = self.read(key, "an object", |value| value.as_object().cloned())?.unwrap_or_default();
        let entry = |(name, value): (&String, &Value)| {
            let value = read(value).ok_or_else(|| wrong(&format!("{key}.{name}"), value, want))?;
            Ok((Pattern::new(key, [r"\A(?:(.*\.)?(", name, ")$)"])?, value))
        };
        entries.iter().map(entry).collect()
    }

    /// `init_lora_weights`. A method that changed the base weights is supported only if it is deterministic. `pissa_niter_4` is not:
    /// it starts from random numbers, and the initial factors are not in the folder (PEFT draws new ones when it loads such a folder,
    /// so the result differs).
    pub(super) fn init_method(&self) -> Result<InitMethod> {
        match self.0.get("init_lora_weights") {
            None | Some(Value::Null | Value::Bool(true)) => Ok(InitMethod::Default),
            Some(Value::Bool(false)) => Ok(InitMethod::NonZero),
            Some(Value::String(name)) if name.eq_ignore_ascii_case("gaussian") => Ok(InitMethod::Gaussian),
            Some(Value::String(name)) if name.eq_ignore_ascii_case("orthogonal") => Ok(InitMethod::Orthogonal),
            Some(Value::String(name)) if ["eva", "mica"].contains(&name.as_str()) => Ok(InitMethod::External),
            Some(Value::String(name)) if name == "pissa" => Ok(InitMethod::Principal(Principal::Pissa)),
            Some(Value::String(name)) if name.eq_ignore_ascii_case("olora") => Ok(InitMethod::Principal(Principal::Olora)),
            Some(other) => Err(unsupported("init_lora_weights", other)),
        }
    }
}

/// The part of a weight that the factors of an adapter were initialised with: PEFT's `init_lora_weights` of the same name.
///
/// A folder of such an adapter holds the trained factors `A` and `B`, but not the initial ones, `A₀` and `B₀`. These are computed again
/// from the weight, which needs the feature `svd`. The adapted weight is `W - scaling·B₀·A₀ + scaling·B·A`, that is, a plain update of
/// twice the rank with the factors `[A; A₀]` and `[B, -B₀]`. The adapter is loaded as that update, so the weights are not changed and it
/// can be combined with other adapters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Principal {
    /// The largest singular values and their vectors; `A` and `B` each get the square roots of the values (F. Meng et al., 2024).
    Pissa,
    /// The first columns of `Q` and rows of `R` in `W = Q·R` (K. Büyükakyüz, 2024).
    Olora,
}

impl Principal {
    /// Its name in a config.
    pub fn name(self) -> &'static str {
        match self {
            Principal::Pissa => "pissa",
            Principal::Olora => "olora",
        }
    }

    #[cfg(not(feature = "svd"))]
    pub(crate) fn needs_svd(self) -> Error {
        let value = format!("\"{}\" without the feature `svd`", self.name());
        Error::Unsupported { path: CONFIG_FILE.into(), field: "init_lora_weights", value }
    }
}

/// The value of `init_lora_weights`: [`Init`], before the rank is known.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum InitMethod {
    Default,
    NonZero,
    Gaussian,
    Orthogonal,
    /// Computed from activations or weights (`eva`, `mica`) without changing the weights, so the factors are enough.
    External,
    Principal(Principal),
}

impl InitMethod {
    pub(super) fn of(init: Init) -> Self {
        match init {
            Init::KaimingUniform => InitMethod::Default,
            Init::NonZero => InitMethod::NonZero,
            Init::Gaussian { .. } => InitMethod::Gaussian,
            Init::Orthogonal => InitMethod::Orthogonal,
        }
    }

    pub(super) fn init(self, rank: usize) -> Init {
        match self {
            InitMethod::Default | InitMethod::External | InitMethod::Principal(_) => Init::KaimingUniform,
            InitMethod::NonZero => Init::NonZero,
            InitMethod::Gaussian => Init::Gaussian { std: 1.0 / rank as f32 },
            InitMethod::Orthogonal => Init::Orthogonal,
        }
    }

    pub(super) fn value(self) -> Value {
        match self {
            InitMethod::Default | InitMethod::External => json!(true),
            InitMethod::NonZero => json!(false),
            InitMethod::Gaussian => json!("gaussian"),
            InitMethod::Orthogonal => json!("orthogonal"),
            InitMethod::Principal(part) => json!(part.name()),
        }
    }
}

fn names(value: &Value) -> Option<Vec<String>> {
    value.as_array()?.iter().map(|name| name.as_str().map(String::from)).collect()
}

pub(super) fn rank(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|rank| usize::try_from(rank).ok()).filter(|&rank| rank > 0)
}

pub(super) fn dropout(value: &Value) -> Option<f32> {
    value.as_f64().map(|p| p as f32).filter(|p| (0.0..1.0).contains(p))
}

/// True if a value enables something. An object with flags, such as `runtime_config`, does if one of the flags is set.
fn switches(value: &Value) -> bool {
    match value {
        Value::Object(entries) if entries.values().any(Value::is_boolean) => {
            entries.values().any(|entry| !entry.is_number() && !entry.is_string() && switches(entry))
        }
        value => is_set(value),
    }
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

/// An error about the config; the folder is added to its path later.
pub(super) fn refused(reason: String) -> Error {
    Error::File { path: CONFIG_FILE.into(), reason }
}

fn wrong(key: &str, value: &Value, want: &str) -> Error {
    refused(format!("`{key}` is {}, want {want}", brief(&value.to_string())))
}

pub(super) fn unsupported(field: &'static str, value: &Value) -> Error {
    Error::Unsupported { path: CONFIG_FILE.into(), field, value: brief(&value.to_string()) }
}

/// The start of a text, so that a long value does not fill a message.
pub(super) fn brief(text: &str) -> String {
    const LONGEST: usize = 60;
    let mut brief: String = text.chars().take(LONGEST).collect();
    if brief.len() < text.len() {
        brief.push('…');
    }
    brief
}

/// Every key that PEFT 0.21 writes, sorted, at its default.
pub(super) fn peft_defaults() -> Map<String, Value> {
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
        _ => Map::new(), // unreachable: the literal above is an object
    }
}
