//! `adapter_config.json`: the settings of an adapter, with PEFT's names.

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
/// All keys of the file are kept, in their order, and written again, including those that this crate does not know. An unknown key that
/// enables something (`true`, a list, an object) is refused.
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
    init: InitMethod,
    bias: Bias,
    lora_bias: bool,
    use_dora: bool,
    fan_in_fan_out: bool,
}

/// The layers that get an update: `target_modules`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetModules<'c> {
    /// `all-linear`: all linear layers.
    AllLinear,
    /// Layers with one of these names, or with a name that ends with a dot and one of these.
    Names(&'c [String]),
    /// Layers whose full name matches this regular expression.
    Matching(&'c str),
}

/// The part of an adapter that a config describes for one layer.
#[derive(Clone, Debug, PartialEq)]
pub enum LayerTarget {
    /// An update with these settings.
    Lora(LoraConfig),
    /// A bias that replaces the layer's, if the layer has one: `bias = "all"`.
    Bias,
    /// A copy of the whole layer, which is trained: `modules_to_save`.
    Whole,
}

impl AdapterConfig {
    /// Parses the bytes of a file. Only `peft_type` and `target_modules` are required.
    ///
    /// Errors: [`Error::File`] for bytes that are no such file, or a setting out of range; [`Error::Unsupported`] for a setting that this
    /// crate does not support.
    pub fn from_json(bytes: &[u8]) -> Result<Self> {
        let text = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes); // a byte order mark, as some editors write it
        Self::from_document(
            serde_json::from_slice(text).map_err(|error| refused(json_damage(Path::new(CONFIG_FILE), bytes, &error)))?,
        )
    }

    /// The settings of an adapter for these modules, with PEFT's defaults for all others. No model is needed.
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
    /// A config does not hold the standard deviation of [`Init::Gaussian`](crate::nn::Init); PEFT uses `1/r`.
    ///
    /// Errors: [`Error::Value`] for settings out of range and for an empty list of names; [`Error::File`], as if such a config were read,
    /// for a pattern that is not a regular expression.
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
        let new = Self::with_defaults(settings(config, use_rslora).into_iter().chain(rest))?;
        // The pattern `all-linear` would be read as `AllLinear`.
        let same = new.target_modules() == target_modules;
        Error::unless(same, "adapter_config", "target_modules", "the pattern `all-linear`", "`TargetModules::AllLinear`")?;
        Ok(new)
    }

    /// The settings of a model's adapter `default`, with PEFT's defaults for all others. Errors: [`Error::Value`] without such an adapter,
    /// or if its layers differ in a setting that a config has only once.
    pub fn of<B: Backend>(model: &impl Adaptable<B>) -> Result<Self> {
        Self::of_adapter(model, DEFAULT)
    }

    /// The settings of an adapter of a model, with PEFT's defaults for all others. Errors: those of [`of`](Self::of).
    pub fn of_adapter<B: Backend>(model: &impl Adaptable<B>, name: &str) -> Result<Self> {
        Self::describe(model, name, peft_defaults())
    }

    /// A copy that describes the adapter `default` of a model; every key that agrees with the model is kept. Errors: those of
    /// [`of`](Self::of).
    pub fn updated<B: Backend>(&self, model: &impl Adaptable<B>) -> Result<Self> {
        match self.first_difference(model, DEFAULT) {
            None if self.principal().is_none() => Ok(self.clone()),
            _ => Self::describe(model, DEFAULT, self.document.clone()),
        }
    }

    /// The file as PEFT writes it: indented by two spaces, without a newline at the end.
    pub fn to_json(&self) -> String {
        format!("{:#}", Value::Object(self.document.clone()))
    }

    /// The part of the adapter for a layer of this name; `None` if the adapter does not change the layer.
    pub fn layer_target(&self, layer: &str) -> Option<LayerTarget> {
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

    /// True if a parameter of this name gets an update: `target_parameters`.
    pub(super) fn targets_parameter(&self, name: &str) -> bool {
        self.target_parameters.iter().any(|target| {
            let above = name.strip_suffix(target.as_str());
            above.is_some_and(|above| above.is_empty() || above.ends_with('.'))
        })
    }

    /// The parameters of a module that get an update (the last components of their names), in the order in which models register
    /// them. PEFT nests their updates in this order, from the inside out.
    ///
    /// Errors: [`Error::File`] for two or more parameters if the order of one is not known.
    pub(super) fn parameters(&self, module: &str) -> Result<Vec<&str>> {
        const REGISTERED: [&str; 2] = ["gate_up_proj", "down_proj"];
        // A target without a dot names a parameter of experts, because the only such parameter of a linear layer is `weight`.
        let experts = module.split('.').any(|part| part == "experts");
        let targets = self.target_parameters.iter().filter(|target| experts || target.contains('.'));
        let names = targets.filter_map(|target| target.rsplit('.').next());
        let mut names: Vec<&str> = names.filter(|name| self.targets_parameter(&format!("{module}.{name}"))).collect();
        names.sort_by_key(|name| REGISTERED.iter().position(|known| known == name).unwrap_or(REGISTERED.len()));
        names.dedup();
        match names.iter().find(|name| !REGISTERED.contains(name)).filter(|_| names.len() > 1) {
            Some(name) => {
                Err(refused(format!("`target_parameters`: which update of `{module}` belongs to `{name}` is not known")))
            }
            None => Ok(names),
        }
    }

    /// The trained rows of an embedding table, in the order of the file: `trainable_token_indices`.
    pub(crate) fn tokens(&self, module: &str) -> Option<&[usize]> {
        let of = |layer: &str| module.strip_suffix(layer).is_some_and(|above| above.is_empty() || above.ends_with('.'));
        let found = self.tokens.iter().find(|(layer, _)| layer.as_deref().is_none_or(of));
        found.map(|(_, rows)| rows.as_slice())
    }

    /// `ensure_weight_tying`: if true, a change to the embedding is also made to the output head that shares its weight.
    pub fn ensures_weight_tying(&self) -> bool {
        self.ensure_weight_tying
    }

    /// Errors: [`Error::Unsupported`] for a setting about single parameters or rows instead of layers.
    pub(super) fn only_layers(&self) -> Result<()> {
        let set = |&field: &&'static str| Some((field, self.get(field).filter(|value| is_set(value))?));
        let set = ["target_parameters", "trainable_token_indices"].iter().find_map(set);
        set.map_or(Ok(()), |(field, value)| Err(unsupported(field, value)))
    }

    /// The settings that an update of this name has, also if the name is not a target.
    pub(super) fn settings(&self, layer: &str) -> LoraConfig {
        let rank = first_match(&self.rank_pattern, layer).unwrap_or(self.r);
        let lora_alpha = first_match(&self.alpha_pattern, layer).unwrap_or(self.lora_alpha);
        let (alpha, scaling) = match (lora_alpha as f32, self.use_rslora) {
            (alpha, true) if f64::from(alpha) == lora_alpha => (alpha, Scaling::AlphaOverSqrtRank),
            (alpha, false) if f64::from(alpha) == lora_alpha => (alpha, Scaling::AlphaOverRank),
            // An alpha that is no `f32` (a raw alpha that was saved, for example): divided before it is rounded, as in PEFT.
            (_, true) => ((lora_alpha / (rank as f64).sqrt()) as f32, Scaling::Raw),
            (_, false) => ((lora_alpha / rank as f64) as f32, Scaling::Raw),
        };
        LoraConfig {
            rank,
            alpha,
            scaling,
            dropout: self.lora_dropout,
            init: self.init.init(rank),
            use_dora: self.use_dora,
            lora_bias: self.lora_bias,
            bias: self.bias,
            modules_to_save: self.selection.saved.iter().map(|saved| saved.name.clone()).collect(),
        }
    }

    /// Checks the settings of one layer in combination. Errors: [`Error::File`] for a scaling that overflows `f32`, an odd rank with
    /// orthogonal factors, or a pattern that takes too many steps on the name.
    pub(super) fn check(&self, layer: &str, config: &LoraConfig) -> Result<()> {
        let ranks = self.rank_pattern.iter().map(|(pattern, _)| pattern);
        let alphas = self.alpha_pattern.iter().map(|(pattern, _)| pattern);
        self.selection.patterns().chain(ranks).chain(alphas).try_for_each(|pattern| pattern.check_steps(layer))?;
        if !config.scaling.of(config.alpha, config.rank).is_finite() {
            let alpha = first_match(&self.alpha_pattern, layer).unwrap_or(self.lora_alpha);
            return Err(refused(format!("`lora_alpha` of `{layer}` is {alpha:?}, want one whose scaling f32 can hold")));
        }
        config.check().map_err(|error| match error {
            Error::Value { name, got, want, .. } => refused(format!("`{name}` of `{layer}` is {got}, want {want}")),
            other => other,
        })
    }

    /// `r`: the rank of modules that `rank_pattern` does not match.
    pub fn r(&self) -> usize {
        self.r
    }

    /// `lora_alpha`: that of modules that `alpha_pattern` does not match.
    pub fn lora_alpha(&self) -> f64 {
        self.lora_alpha
    }

    /// `target_modules`: the layers that get an update.
    pub fn target_modules(&self) -> TargetModules<'_> {
        match (&self.selection.targets, self.get("target_modules")) {
            (Modules::Names(names), _) => TargetModules::Names(names),
            (Modules::Matching(_), Some(Value::String(pattern))) => TargetModules::Matching(pattern),
            _ => TargetModules::AllLinear,
        }
    }

    /// `base_model_name_or_path`: the model that the adapter is for, if the config has it.
    pub fn base_model_name_or_path(&self) -> Option<&str> {
        self.get("base_model_name_or_path").and_then(Value::as_str)
    }

    /// `task_type`, such as `CAUSAL_LM`, if the config has it.
    pub fn task_type(&self) -> Option<&str> {
        self.get("task_type").and_then(Value::as_str)
    }

    /// Sets `base_model_name_or_path`; [`save_with`](super::save_with) writes it.
    #[must_use]
    pub fn with_base_model_name_or_path(mut self, name: &str) -> Self {
        self.document.insert("base_model_name_or_path".into(), json!(name));
        self
    }

    /// Sets `task_type`, one of PEFT's names such as `CAUSAL_LM`.
    #[must_use]
    pub fn with_task_type(mut self, task_type: &str) -> Self {
        self.document.insert("task_type".into(), json!(task_type));
        self
    }

    /// The part of each weight that the factors were initialised with, if `init_lora_weights` is `pissa` or `olora`.
    pub fn principal(&self) -> Option<Principal> {
        match self.init {
            InitMethod::Principal(part) => Some(part),
            _ => None,
        }
    }

    /// `fan_in_fan_out`: true for a model that stores its weights as `in × out`. The factors are stored in the same way for either
    /// layout. [`Linear::from_fan_in_fan_out`](crate::nn::Linear::from_fan_in_fan_out) transposes such a weight.
    pub fn fan_in_fan_out(&self) -> bool {
        self.fan_in_fan_out
    }

    /// The value of a key of the file, known or unknown.
    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.document.get(key)
    }

    /// PEFT's defaults, with these settings. Errors: those of [`from_json`](Self::from_json).
    pub(super) fn with_defaults(settings: impl IntoIterator<Item = (&'static str, Value)>) -> Result<Self> {
        let mut document = peft_defaults();
        document.extend(settings.into_iter().map(|(key, value)| (key.to_string(), value)));
        Self::from_document(document)
    }

    /// A copy with these settings replaced. Errors: those of [`from_json`](Self::from_json).
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
            init: fields.init_method()?,
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

    /// `document` with the settings of an adapter of a model.
    fn describe<B: Backend>(model: &impl Adaptable<B>, name: &str, mut document: Map<String, Value>) -> Result<Self> {
        let adapters: Vec<(&str, &LoraConfig)> = model.adapters(name).map(|(layer, adapter)| (layer, adapter.config())).collect();
        let Some(&(_, first)) = adapters.first() else {
            return Err(cannot_save(format!("without an adapter `{name}`"), "at least one layer with it"));
        };
        let use_rslora = adapters.iter().all(|(_, config)| config.scaling == Scaling::AlphaOverSqrtRank);
        let alpha = |config: &LoraConfig| number(lora_alpha(config, use_rslora));
        let whole = whole_layers(model, name);
        let rest = [
            ("alpha_pattern", exceptions(&adapters, alpha)),
            ("bias", json!(bias_setting(model, name))),
            ("exclude_modules", Value::Null),
            ("layers_pattern", Value::Null),
            ("layers_to_transform", Value::Null),
            ("modules_to_save", list(&whole)),
            ("rank_pattern", exceptions(&adapters, |config| json!(config.rank))),
            ("target_modules", adapters.iter().map(|(layer, _)| *layer).collect()),
        ];
        let mut settings: Vec<_> = settings(first, use_rslora).into_iter().chain(rest).collect();
        settings.sort_unstable_by_key(|(key, _)| *key); // keys that are new to the document are appended in this order
        document.extend(settings.into_iter().map(|(key, value)| (key.to_string(), value)));
        let config = Self::from_document(document)?;
        match config.first_difference(model, name) {
            None => Ok(config),
            Some(layer) => {
                let want = "one `lora_dropout`, `use_dora`, `lora_bias` and `bias` for all layers";
                Err(cannot_save(format!("one whose layer `{layer}` has other settings"), want))
            }
        }
    }

    /// The first layer whose adapter in the model is not what the config describes.
    fn first_difference<'m, B: Backend>(&self, model: &'m impl Adaptable<B>, name: &str) -> Option<&'m str> {
        let described = |layer: &str, has_bias: bool| match self.layer_target(layer)? {
            LayerTarget::Lora(config) => Some(Effect::Lora(effect(&config), has_bias && config.bias != Bias::None)),
            LayerTarget::Bias => has_bias.then_some(Effect::Bias),
            LayerTarget::Whole => Some(Effect::Whole),
        };
        let actual = |layer: &Layer<B>| match layer.lora()?.part(name)? {
            LayerAdapter::Lora(adapter) => Some(Effect::Lora(effect(adapter.config()), adapter.bias().is_some())),
            LayerAdapter::Bias(_) => Some(Effect::Bias),
            LayerAdapter::Whole(_) => Some(Effect::Whole),
        };
        let mut layers = model.layers();
        layers.find(|(name, layer)| described(name, layer.base().bias().is_some()) != actual(layer)).map(|(name, _)| name)
    }
}

/// The part of an adapter that belongs to one layer, reduced to what a config describes.
#[derive(PartialEq)]
enum Effect {
    Lora((usize, f32, f32, bool, bool), bool),
    Bias,
    Whole,
}

/// Rank, scaling, dropout, and whether there are magnitudes and a bias of the update.
fn effect(config: &LoraConfig) -> (usize, f32, f32, bool, bool) {
    (config.rank, config.scaling.of(config.alpha, config.rank), config.dropout, config.use_dora, config.lora_bias)
}

/// The value of `bias`: `all` if some layer has only a bias from this adapter.
fn bias_setting<B: Backend>(model: &impl Adaptable<B>, name: &str) -> &'static str {
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

/// The value of `modules_to_save`: the layers that this adapter replaces.
fn whole_layers<'m, B: Backend>(model: &'m impl Adaptable<B>, name: &str) -> Vec<&'m str> {
    let whole = |layer: &Layer<B>| matches!(layer.lora().and_then(|lora| lora.part(name)), Some(LayerAdapter::Whole(_)));
    model.layers().filter(|(_, layer)| whole(layer)).map(|(name, _)| name).collect()
}

/// A list of names, or `null` for none.
fn list<S: AsRef<str>>(names: &[S]) -> Value {
    if names.is_empty() { Value::Null } else { names.iter().map(S::as_ref).collect() }
}

/// The keys of a config that follow from the settings of one layer.
fn settings(config: &LoraConfig, use_rslora: bool) -> [(&'static str, Value); 7] {
    // PEFT accepts `lora_bias` only with `init_lora_weights` true or false.
    let init = Some(InitMethod::of(config.init)).filter(|_| !config.lora_bias).unwrap_or(InitMethod::Default);
    [
        ("init_lora_weights", init.value()),
        ("lora_alpha", number(lora_alpha(config, use_rslora))),
        ("lora_bias", json!(config.lora_bias)),
        ("lora_dropout", json!(shortest(config.dropout))),
        ("r", json!(config.rank)),
        ("use_dora", json!(config.use_dora)),
        ("use_rslora", json!(use_rslora)),
    ]
}

/// An object of the layers whose setting differs from that of the first layer, which is the setting for all others.
fn exceptions(adapters: &[(&str, &LoraConfig)], setting: impl Fn(&LoraConfig) -> Value) -> Value {
    let usual = adapters.first().map(|(_, config)| setting(config));
    let settings = adapters.iter().map(|(name, config)| (name.to_string(), setting(config)));
    Value::Object(settings.filter(|(_, setting)| Some(setting) != usual.as_ref()).collect())
}

/// The `lora_alpha` that gives the scaling of an adapter. It is exact, because `f64` holds any `f32` times a rank.
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

/// A JSON number: `8`, not `8.0`, for a whole number, as PEFT writes it.
pub(super) fn number(value: f64) -> Value {
    let whole = value as i64;
    if whole as f64 == value { json!(whole) } else { json!(value) }
}

/// The shortest decimal that rounds to this `f32`: 0.1, not 0.10000000149011612.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

fn cannot_save(got: String, want: &'static str) -> Error {
    Error::Value { verb: "save", name: "model", got, want: want.into() }
}
