//! `adapter_config.json`: the settings of an adapter, under PEFT's names.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::config_fields::{Fields, InitMethod, RANK, dropout, is_set, peft_defaults, rank, refused, unsupported};
use super::formats::json_damage;
use super::modules::{Modules, Selection};
use super::pattern::Pattern;
use super::{CONFIG_FILE, Principal};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::nn::{Adaptable, Adapter, Bias, DEFAULT, Layer, LayerAdapter, LoraConfig, Scaling};

/// The settings in an `adapter_config.json`.
///
/// It remembers the file as it was: keys that this crate does not know, and the order of all, are written again. An unknown key that
/// switches something on (`true`, a list, an object) is refused.
#[derive(Clone, Debug)]
pub struct AdapterConfig {
    document: Map<String, Value>,
    selection: Selection,
    target_parameters: Vec<String>,
    tokens: Vec<(Option<String>, Vec<usize>)>,
    ensure_weight_tying: bool,
    r: usize,
    lora_alpha: f64,
    rank_pattern: Vec<(Pattern, usize)>,
    alpha_pattern: Vec<(Pattern, f64)>,
    use_rslora: bool,
    lora_dropout: f32,
    begins: InitMethod,
    bias: Bias,
    lora_bias: bool,
    use_dora: bool,
    fan_in_fan_out: bool,
}

/// Which layers get an update: `target_modules`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetModules<'c> {
    /// `all-linear`: all of them.
    AllLinear,
    /// Those whose names are these, or end with a dot and one of these.
    Names(&'c [String]),
    /// Those whose whole name is matched by this regular expression.
    Matching(&'c str),
}

/// What a config asks for a layer.
#[derive(Clone, Debug, PartialEq)]
pub enum LayerTarget {
    /// An update with these settings.
    Lora(LoraConfig),
    /// A bias of its own, if the layer has one: `bias = "all"`.
    Bias,
    /// A copy, trained whole: `modules_to_save`.
    Whole,
}

impl AdapterConfig {
    /// Reads the bytes of a file; `peft_type` and `target_modules` are the least it must hold.
    ///
    /// Errors: [`Error::File`] for what is not such a file or has a setting outside its range; [`Error::Unsupported`] for a
    /// setting that this crate does not know how to honour.
    pub fn from_json(bytes: &[u8]) -> Result<Self> {
        let text = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes); // a byte order mark, as some editors write it
        Self::from_document(
            serde_json::from_slice(text).map_err(|error| refused(json_damage(Path::new(CONFIG_FILE), bytes, &error)))?,
        )
    }

    /// The settings of an adapter of these modules, beside PEFT's defaults; no model is needed.
    ///
    /// ```
    /// use lowrank::adapter::{AdapterConfig, TargetModules};
    /// use lowrank::nn::LoraConfig;
    ///
    /// let names = ["q_proj", "v_proj"].map(String::from);
    /// let config = AdapterConfig::new(&LoraConfig::new(8, 16.0), TargetModules::Names(&names))?;
    /// assert_eq!(config.lora_config("model.layers.0.self_attn.q_proj").unwrap().rank, 8);
    /// assert!(config.lora_config("model.layers.0.self_attn.k_proj").is_none());
    /// # Ok::<(), lowrank::Error>(())
    /// ```
    ///
    /// Errors: [`Error::Value`] for settings out of range and for no name; [`Error::File`], as when such a config is read, for a pattern
    /// that is no regular expression. A config does not hold the deviation of [`Init::Gaussian`](crate::nn::Init): PEFT's is `1/r`.
    pub fn new(config: &LoraConfig, target_modules: TargetModules<'_>) -> Result<Self> {
        config.check()?;
        let none = matches!(target_modules, TargetModules::Names([]));
        Error::unless(!none, "adapter_config", "target_modules", "none", "at least one name")?;
        let targets = match target_modules {
            TargetModules::AllLinear => json!("all-linear"),
            TargetModules::Names(names) => json!(names),
            TargetModules::Matching(pattern) => json!(pattern),
        };
        let bias = match config.bias {
            Bias::None => "none",
            Bias::All => "all",
            Bias::LoraOnly => "lora_only",
        };
        let use_rslora = config.scaling == Scaling::AlphaOverSqrtRank;
        let rest = [("bias", json!(bias)), ("modules_to_save", list(&config.modules_to_save)), ("target_modules", targets)];
        let new = Self::beside_defaults(settings(config, use_rslora).into_iter().chain(rest))?;
        // The pattern `all-linear` is the word for all of them.
        let same = new.target_modules() == target_modules;
        Error::unless(same, "adapter_config", "target_modules", "the pattern `all-linear`", "`TargetModules::AllLinear`")?;
        Ok(new)
    }

    /// The settings of a model's adapter `default`, beside PEFT's defaults. Errors: [`Error::Value`] if it has none, or such as no
    /// config can tell.
    pub fn of<B: Backend>(model: &impl Adaptable<B>) -> Result<Self> {
        Self::of_adapter(model, DEFAULT)
    }

    /// The settings of an adapter of a model, beside PEFT's defaults. Errors: as [`of`](Self::of).
    pub fn of_adapter<B: Backend>(model: &impl Adaptable<B>, name: &str) -> Result<Self> {
        Self::describing(model, name, peft_defaults())
    }

    /// The same config if it tells what adapter `default` the model has, else one that does, with every other key kept.
    pub fn updated<B: Backend>(&self, model: &impl Adaptable<B>) -> Result<Self> {
        match self.misdescribed(model, DEFAULT) {
            None if self.began_with().is_none() => Ok(self.clone()),
            _ => Self::describing(model, DEFAULT, self.document.clone()),
        }
    }

    /// As PEFT writes it: two spaces of indent, nothing after the last brace.
    pub fn to_json(&self) -> String {
        format!("{:#}", Value::Object(self.document.clone()))
    }

    /// What the config asks for a layer of this name, if anything.
    pub fn asks(&self, layer: &str) -> Option<LayerTarget> {
        if self.selection.saves(layer) {
            return Some(LayerTarget::Whole);
        }
        let bias = (self.bias == Bias::All).then_some(LayerTarget::Bias);
        self.lora_config(layer).map(LayerTarget::Lora).or(bias)
    }

    /// The settings of the update of a layer of this name; `None` if it is not a target.
    pub fn lora_config(&self, layer: &str) -> Option<LoraConfig> {
        (self.selection.targets(layer) || self.targets_parameter(&format!("{layer}.weight"))).then(|| self.settings(layer))
    }

    /// Whether a parameter of this name gets an update: `target_parameters`.
    pub(super) fn targets_parameter(&self, name: &str) -> bool {
        self.target_parameters.iter().any(|target| {
            let above = name.strip_suffix(target.as_str());
            above.is_some_and(|above| above.is_empty() || above.ends_with('.'))
        })
    }

    /// The parameters of a module that get an update, by their last names, in the order in which models register them. PEFT nests
    /// their updates in this order, from the inside out.
    ///
    /// Errors: [`Error::File`] for several of which some are none of those whose order is known.
    pub(super) fn parameters(&self, module: &str) -> Result<Vec<&str>> {
        const REGISTERED: [&str; 2] = ["gate_up_proj", "down_proj"];
        // A target without a dot is the name of a parameter of experts: linear layers have one only, their weight.
        let experts = module.split('.').any(|part| part == "experts");
        let targets = self.target_parameters.iter().filter(|target| experts || target.contains('.'));
        let names = targets.filter_map(|target| target.rsplit('.').next());
        let mut names: Vec<&str> = names.filter(|name| self.targets_parameter(&format!("{module}.{name}"))).collect();
        names.sort_by_key(|name| REGISTERED.iter().position(|known| known == name).unwrap_or(REGISTERED.len()));
        names.dedup();
        match names.iter().find(|name| !REGISTERED.contains(name)).filter(|_| names.len() > 1) {
            Some(name) => {
                Err(refused(format!("`target_parameters`: nothing tells which update of `{module}` is that of `{name}`")))
            }
            None => Ok(names),
        }
    }

    /// The rows of a table that are trained, in the order in which the file has them: `trainable_token_indices`.
    pub(crate) fn tokens(&self, module: &str) -> Option<&[usize]> {
        let of = |layer: &str| module.strip_suffix(layer).is_some_and(|above| above.is_empty() || above.ends_with('.'));
        let found = self.tokens.iter().find(|(layer, _)| layer.as_deref().is_none_or(of));
        found.map(|(_, rows)| rows.as_slice())
    }

    /// `ensure_weight_tying`: whether what is done to the embedding is done to the head that shares its weight.
    pub fn ensures_weight_tying(&self) -> bool {
        self.ensure_weight_tying
    }

    /// Errors: [`Error::Unsupported`] for a setting that speaks of something else than whole layers.
    pub(super) fn only_layers(&self) -> Result<()> {
        let set = |&field: &&'static str| Some((field, self.get(field).filter(|value| is_set(value))?));
        let set = ["target_parameters", "trainable_token_indices"].iter().find_map(set);
        set.map_or(Ok(()), |(field, value)| Err(unsupported(field, value)))
    }

    /// The settings of an update, whether or not the name is a target.
    pub(super) fn settings(&self, layer: &str) -> LoraConfig {
        let rank = first_match(&self.rank_pattern, layer).unwrap_or(self.r);
        let lora_alpha = first_match(&self.alpha_pattern, layer).unwrap_or(self.lora_alpha);
        let (alpha, scaling) = match (lora_alpha as f32, self.use_rslora) {
            (alpha, true) if f64::from(alpha) == lora_alpha => (alpha, Scaling::AlphaOverSqrtRank),
            (alpha, false) if f64::from(alpha) == lora_alpha => (alpha, Scaling::AlphaOverRank),
            // An alpha that f32 does not hold: divided before it is rounded, as PEFT does, and as a raw alpha comes back.
            (_, true) => ((lora_alpha / (rank as f64).sqrt()) as f32, Scaling::Raw),
            (_, false) => ((lora_alpha / rank as f64) as f32, Scaling::Raw),
        };
        LoraConfig {
            rank,
            alpha,
            scaling,
            dropout: self.lora_dropout,
            init: self.begins.init(rank),
            use_dora: self.use_dora,
            lora_bias: self.lora_bias,
            bias: self.bias,
            modules_to_save: self.selection.saved.iter().map(|saved| saved.name.clone()).collect(),
        }
    }

    /// Errors: [`Error::File`] for settings of a layer that are fine by themselves and cannot be computed with: a scaling that `f32`
    /// does not hold, an odd rank that begins orthogonal; for a pattern that does not decide.
    pub(super) fn check(&self, layer: &str, asked: &LoraConfig) -> Result<()> {
        let ranks = self.rank_pattern.iter().map(|(pattern, _)| pattern);
        let alphas = self.alpha_pattern.iter().map(|(pattern, _)| pattern);
        self.selection.patterns().chain(ranks).chain(alphas).try_for_each(|pattern| pattern.decides(layer))?;
        if !asked.scaling.of(asked.alpha, asked.rank).is_finite() {
            let alpha = first_match(&self.alpha_pattern, layer).unwrap_or(self.lora_alpha);
            return Err(refused(format!("`lora_alpha` of `{layer}` is {alpha:?}, want one whose scaling f32 can hold")));
        }
        asked.check().map_err(|error| match error {
            Error::Value { name, got, want, .. } => refused(format!("`{name}` of `{layer}` is {got}, want {want}")),
            other => other,
        })
    }

    /// `r`: the rank of modules that [`lora_config`](Self::lora_config) tells no other of.
    pub fn r(&self) -> usize {
        self.r
    }

    /// `lora_alpha`: that of modules that [`lora_config`](Self::lora_config) tells no other of.
    pub fn lora_alpha(&self) -> f64 {
        self.lora_alpha
    }

    /// `target_modules`
    pub fn target_modules(&self) -> TargetModules<'_> {
        match (&self.selection.targets, self.get("target_modules")) {
            (Modules::Names(names), _) => TargetModules::Names(names),
            (Modules::Matching(_), Some(Value::String(pattern))) => TargetModules::Matching(pattern),
            _ => TargetModules::AllLinear,
        }
    }

    /// `base_model_name_or_path`: which model it is for, where that is known.
    pub fn base_model_name_or_path(&self) -> Option<&str> {
        self.get("base_model_name_or_path").and_then(Value::as_str)
    }

    /// `task_type`, such as `CAUSAL_LM`, where it is known.
    pub fn task_type(&self) -> Option<&str> {
        self.get("task_type").and_then(Value::as_str)
    }

    /// The same config for the model of this name, which [`save_with`](super::save_with) writes.
    #[must_use]
    pub fn with_base_model_name_or_path(mut self, name: &str) -> Self {
        self.document.insert("base_model_name_or_path".into(), json!(name));
        self
    }

    /// The same config for a task of this type, by PEFT's names, such as `CAUSAL_LM`.
    #[must_use]
    pub fn with_task_type(mut self, task_type: &str) -> Self {
        self.document.insert("task_type".into(), json!(task_type));
        self
    }

    /// Which part of each weight the adapter began with, if any.
    pub fn began_with(&self) -> Option<Principal> {
        match self.begins {
            InitMethod::With(part) => Some(part),
            _ => None,
        }
    }

    /// Whether it is for a model that stores its weights `in × out`. The factors are stored alike either way, and a
    /// [`Linear`](crate::nn::Linear) is `out × in` always: it turns such a weight around when it is made.
    pub fn fan_in_fan_out(&self) -> bool {
        self.fan_in_fan_out
    }

    /// What the file says under a key that this crate knows or does not know.
    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.document.get(key)
    }

    /// PEFT's defaults, with these settings. Errors: those of [`from_json`](Self::from_json).
    pub(super) fn beside_defaults(settings: impl IntoIterator<Item = (&'static str, Value)>) -> Result<Self> {
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
        let config = Self {
            selection: fields.selection()?,
            target_parameters: fields.target_parameters()?,
            tokens: fields.tokens()?,
            ensure_weight_tying: fields.flag("ensure_weight_tying")?,
            r: fields.read("r", RANK, rank)?.unwrap_or(8),
            lora_alpha: fields.read("lora_alpha", "a number", Value::as_f64)?.unwrap_or(8.0),
            rank_pattern: fields.pattern("rank_pattern", RANK, rank)?,
            alpha_pattern: fields.pattern("alpha_pattern", "a number", Value::as_f64)?,
            use_rslora: fields.flag("use_rslora")?,
            lora_dropout: fields.read("lora_dropout", "at least 0 and below 1", dropout)?.unwrap_or(0.0),
            begins: fields.begins()?,
            bias: fields.bias()?,
            lora_bias: fields.flag("lora_bias")?,
            use_dora: fields.flag("use_dora")?,
            fan_in_fan_out: fields.flag("fan_in_fan_out")?,
            document,
        };
        match config.use_dora && config.lora_bias {
            true => Err(refused("`lora_bias` is set beside `use_dora`, want one of the two".into())),
            false => Ok(config),
        }
    }

    fn describing<B: Backend>(model: &impl Adaptable<B>, name: &str, mut document: Map<String, Value>) -> Result<Self> {
        let adapters: Vec<(&str, &LoraConfig)> = model.adapters(name).map(|(layer, adapter)| (layer, adapter.config())).collect();
        let Some(&(_, first)) = adapters.first() else {
            return Err(unsaid(format!("no adapter `{name}`"), "at least one layer with it"));
        };
        let use_rslora = adapters.iter().all(|(_, config)| config.scaling == Scaling::AlphaOverSqrtRank);
        let alpha = |config: &LoraConfig| number(lora_alpha(config, use_rslora));
        let whole = whole_layers(model, name);
        let rest = [
            ("alpha_pattern", exceptions(&adapters, alpha)),
            ("bias", json!(brought_biases(model, name))),
            ("exclude_modules", Value::Null),
            ("layers_pattern", Value::Null),
            ("layers_to_transform", Value::Null),
            ("modules_to_save", list(&whole)),
            ("rank_pattern", exceptions(&adapters, |config| json!(config.rank))),
            ("target_modules", adapters.iter().map(|(layer, _)| *layer).collect()),
        ];
        let mut settings: Vec<_> = settings(first, use_rslora).into_iter().chain(rest).collect();
        settings.sort_unstable_by_key(|(key, _)| *key); // keys that are new to the document come in this order
        document.extend(settings.into_iter().map(|(key, value)| (key.to_string(), value)));
        let config = Self::from_document(document)?;
        match config.misdescribed(model, name) {
            None => Ok(config),
            Some(layer) => {
                let want = "one `lora_dropout`, `use_dora`, `lora_bias` and `bias` for all layers";
                Err(unsaid(format!("`{layer}` with settings of its own"), want))
            }
        }
    }

    /// The first layer for which the config tells something else than the model has.
    fn misdescribed<'m, B: Backend>(&self, model: &'m impl Adaptable<B>, name: &str) -> Option<&'m str> {
        let told = |layer: &str, has_bias: bool| match self.asks(layer)? {
            LayerTarget::Lora(config) => Some(Effect::Lora(effect(&config), has_bias && config.bias != Bias::None)),
            LayerTarget::Bias => has_bias.then_some(Effect::Bias),
            LayerTarget::Whole => Some(Effect::Whole),
        };
        let has = |layer: &Layer<B>| match layer.lora()?.part(name)? {
            LayerAdapter::Lora(adapter) => Some(Effect::Lora(effect(adapter.config()), adapter.bias().is_some())),
            LayerAdapter::Bias(_) => Some(Effect::Bias),
            LayerAdapter::Whole(_) => Some(Effect::Whole),
        };
        let mut layers = model.layers();
        layers.find(|(name, layer)| told(name, layer.base().bias().is_some()) != has(layer)).map(|(name, _)| name)
    }
}

/// What an adapter does to a layer, as far as a config tells.
#[derive(PartialEq)]
enum Effect {
    Lora((usize, f32, f32, bool, bool), bool),
    Bias,
    Whole,
}

/// Rank, scaling, dropout, magnitudes, a bias of the update.
fn effect(config: &LoraConfig) -> (usize, f32, f32, bool, bool) {
    (config.rank, config.scaling.of(config.alpha, config.rank), config.dropout, config.use_dora, config.lora_bias)
}

/// `bias`: all, if a layer has nothing else from this adapter.
fn brought_biases<B: Backend>(model: &impl Adaptable<B>, name: &str) -> &'static str {
    let parts = || model.layers().filter_map(|(_, layer)| layer.lora()?.part(name));
    let own = |adapter: &Adapter<B>| adapter.bias().is_some();
    if parts().any(|part| matches!(part, LayerAdapter::Bias(_))) {
        "all"
    } else if parts().filter_map(LayerAdapter::adapter).any(own) {
        "lora_only"
    } else {
        "none"
    }
}

/// `modules_to_save`: the layers that this adapter has whole.
fn whole_layers<'m, B: Backend>(model: &'m impl Adaptable<B>, name: &str) -> Vec<&'m str> {
    let whole = |layer: &Layer<B>| matches!(layer.lora().and_then(|lora| lora.part(name)), Some(LayerAdapter::Whole(_)));
    model.layers().filter(|(_, layer)| whole(layer)).map(|(name, _)| name).collect()
}

/// A list of names, or `null` for none.
fn list<S: AsRef<str>>(names: &[S]) -> Value {
    if names.is_empty() { Value::Null } else { names.iter().map(S::as_ref).collect() }
}

/// What a config has of settings that are the same for all layers.
fn settings(config: &LoraConfig, use_rslora: bool) -> [(&'static str, Value); 7] {
    // PEFT takes a bias of the update with two ways to begin only.
    let begins = Some(InitMethod::of(config.init)).filter(|_| !config.lora_bias).unwrap_or(InitMethod::Usual);
    [
        ("init_lora_weights", begins.value()),
        ("lora_alpha", number(lora_alpha(config, use_rslora))),
        ("lora_bias", json!(config.lora_bias)),
        ("lora_dropout", json!(shortest(config.dropout))),
        ("r", json!(config.rank)),
        ("use_dora", json!(config.use_dora)),
        ("use_rslora", json!(use_rslora)),
    ]
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

fn first_match<T: Copy>(patterns: &[(Pattern, T)], layer: &str) -> Option<T> {
    patterns.iter().find(|(pattern, _)| pattern.is_match(layer)).map(|&(_, value)| value)
}

/// `8`, not `8.0`, where it is whole: PEFT's alphas mostly are.
pub(super) fn number(value: f64) -> Value {
    let whole = value as i64;
    if whole as f64 == value { json!(whole) } else { json!(value) }
}

/// The shortest decimal that is this number as `f32`: 0.1, not 0.10000000149011612.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

fn unsaid(got: String, want: &'static str) -> Error {
    Error::Value { verb: "save", name: "model", got, want: want.into() }
}
