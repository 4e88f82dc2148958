//! An adapter folder in host memory: settings, factors and other tensors, without a model.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::config::{AdapterConfig, number};
use super::extra_tensors::{Extra, Role, role, unknown};
use super::factors::Factors;
use super::files::{CONFIG_FILE, TENSORS_FILE, at, bad_tensors};
use super::kind::{self, Kind};
use super::matrix::HostMatrix;
use super::publish::publish;
use super::spelling::normalised;
use super::tensor_file::parse_tensors;
use super::tensors::{HostTensors, dimensions, module_of};
use super::{config_fields, layer_tensors};
use crate::backend::Backend;
use crate::element::DType;
use crate::error::{Error, Result};
use crate::file;
use crate::nn::{Adapter, Linear};

/// Settings with which an update is not just `scaling·B·A` of one matrix.
const MORE_THAN_PRODUCTS: [&str; 3] = ["lora_bias", "target_parameters", "use_dora"];
/// Settings with which a folder holds tensors that replace those of the model.
const MORE_THAN_FACTORS: [&str; 3] = ["bias", "modules_to_save", "trainable_token_indices"];

/// An adapter folder in host memory: the settings, the factors of every module by name (`model.layers.0.self_attn.q_proj`), and
/// all other tensors (DoRA magnitudes, biases, whole modules).
#[derive(Clone, Debug)]
pub struct Folder {
    /// The folder that it was read from, for errors.
    dir: PathBuf,
    config: AdapterConfig,
    modules: BTreeMap<String, Factors>,
    /// The kinds of the modules that are not linear layers.
    kinds: BTreeMap<String, Kind>,
    extras: BTreeMap<String, Extra>,
}

impl Folder {
    /// Reads a folder that PEFT wrote.
    pub(super) fn read_peft(dir: &Path) -> Result<Self> {
        let (config, tensors) = (file::read(&dir.join(CONFIG_FILE))?, file::read(&dir.join(TENSORS_FILE))?);
        let parsed = Self::parse(&config, &tensors).map_err(|error| at(dir, error))?;
        Ok(Self { dir: dir.into(), ..parsed })
    }

    /// Parses the bytes of the two files. Errors: those of [`read`](Self::read).
    pub fn parse(config: &[u8], tensors: &[u8]) -> Result<Self> {
        let (config, tensors) = (AdapterConfig::from_json(config)?, parse_tensors(tensors)?);
        let mut tensors = normalised(tensors)?;
        let factor = |name: &String| FACTORS.iter().find_map(|factor| Some(name.strip_suffix(factor)?.to_string()));
        let names: BTreeSet<String> = tensors.keys().filter_map(factor).collect();
        let (mut modules, mut kinds) = (BTreeMap::new(), BTreeMap::new());
        for name in names {
            let (name, parameter) = parameter(&config, &name)?;
            let settings = rank_and_scaling(&config, &name, parameter)?;
            let (kind, factors) = kind::read(&mut tensors, &name, parameter, settings)?;
            if kind != Kind::Linear {
                kinds.insert(name.clone(), kind);
            }
            modules.insert(name, factors);
        }
        let extras = extras(&config, &modules, tensors)?;
        if modules.is_empty() && extras.is_empty() {
            return Err(bad_tensors("holds no adapter".into()));
        }
        Ok(Self { dir: PathBuf::new(), config, modules, kinds, extras })
    }

    /// A folder of these modules. Its settings are derived from their ranks and scalings: `r` and `lora_alpha = scaling·r` are
    /// those of the first module of the largest rank, and `rank_pattern` and `alpha_pattern` hold the others. All other settings
    /// are those of `template`, or PEFT's defaults.
    ///
    /// Errors: [`Error::Value`] for an empty map, for factors that do not fit, a scaling that is not finite, or names that
    /// patterns cannot tell apart.
    pub fn new(template: Option<&AdapterConfig>, modules: BTreeMap<String, Factors>) -> Result<Self> {
        let r = modules.values().map(Factors::rank).max().unwrap_or(0);
        unless(r > 0, format!("{} modules of rank {r}", modules.len()), "at least one module, of rank 1 or more")?;
        for (name, Factors { scaling, .. }) in &modules {
            unless(scaling.is_finite(), format!("`{name}` of scaling {scaling}"), "of finite scalings")?;
        }
        let settings = settings(&modules.iter().map(|(name, m)| (name.clone(), (m.rank(), lora_alpha(m)))).collect());
        let config = match template {
            Some(template) => template.with(settings)?,
            None => AdapterConfig::with_defaults(settings)?,
        };
        Self::from_config(config, modules)
    }

    /// A folder of these modules with these settings, which must give each module the rank and the scaling that it has.
    ///
    /// Errors: [`Error::Value`] for an empty map, for factors that do not fit, and for a module with another rank or scaling than the
    /// settings give it.
    pub fn from_config(config: AdapterConfig, modules: BTreeMap<String, Factors>) -> Result<Self> {
        unless(!modules.is_empty(), "none".into(), "at least one module")?;
        let folder = Self { dir: PathBuf::new(), config, modules, kinds: BTreeMap::new(), extras: BTreeMap::new() };
        folder.check_described()?;
        Ok(folder)
    }

    /// Errors: [`Error::Value`] unless the factors of each module fit, with the rank and the scaling that the settings give it.
    fn check_described(&self) -> Result<()> {
        for (name, Factors { a, b, scaling, .. }) in &self.modules {
            unless(a.rows() == b.cols(), format!("`{name}` with A {} and B {}", a.shape(), b.shape()), "A r×k and B n×r")?;
            let described = rank_and_scaling(&self.config, name, None)? == (a.rows(), *scaling);
            unless(described, format!("`{name}` of rank {}, scaling {scaling}", a.rows()), "told from others by its name")?;
        }
        Ok(())
    }

    /// Sets the kinds of the modules that are not linear layers.
    pub(super) fn of_kinds(self, kinds: BTreeMap<String, Kind>) -> Self {
        Self { kinds, ..self }
    }

    /// Sets `fan_in_fan_out`, for a model that stores the weights of linear layers as `in × out`.
    #[cfg(all(feature = "checkpoint", feature = "svd"))]
    pub(crate) fn stored_in_out(self) -> Result<Self> {
        Ok(Self { config: self.config.with([("fan_in_fan_out", json!(true))])?, ..self })
    }

    /// Copies the tensors of another folder that are not factors.
    #[cfg(feature = "svd")]
    pub(super) fn with_extras(self, other: &Self) -> Self {
        Self { extras: other.extras.clone(), ..self }
    }

    /// Where it was read, for errors.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The settings.
    pub fn config(&self) -> &AdapterConfig {
        &self.config
    }

    /// The factors, by the name of the module.
    pub fn modules(&self) -> &BTreeMap<String, Factors> {
        &self.modules
    }

    /// The kind of a module; linear if there is none of this name.
    pub fn kind(&self, module: &str) -> &Kind {
        self.kinds.get(module).unwrap_or(&Kind::Linear)
    }

    /// The kinds of the modules that are not linear layers.
    #[cfg(feature = "svd")]
    pub(super) fn kinds(&self) -> &BTreeMap<String, Kind> {
        &self.kinds
    }

    /// True if merging would not change any weight: in each module `A` or `B` is zero, and there are no other tensors.
    pub fn changes_nothing(&self) -> bool {
        let zero = |matrix: &HostMatrix| matrix.values().iter().all(|&value| value == 0.0);
        self.extras.is_empty() && self.modules.values().all(|factors| zero(&factors.a) || zero(&factors.b))
    }

    /// The tensors that are not factors, by their names in the file.
    pub fn extras(&self) -> &BTreeMap<String, Extra> {
        &self.extras
    }

    /// Errors: [`Error::Unsupported`] if the adapter has more than factors.
    pub(super) fn only_factors(&self) -> Result<()> {
        self.unset(&MORE_THAN_FACTORS)?;
        let extra = self.extras.keys().next();
        extra.map_or(Ok(()), |name| Err(bad_tensors(format!("`{name}` is not a factor, which is not supported here"))))?;
        self.only_products()
    }

    /// Errors: [`Error::Unsupported`] if the update of a module is not just `scaling·B·A`.
    pub(super) fn only_products(&self) -> Result<()> {
        // The initialisations `pissa` and `olora` changed the weights, so their factors belong to other weights than the model's.
        let principal = self.config.principal().map(|part| json!(part.name()));
        principal.map_or(Ok(()), |value| Err(at(&self.dir, config_fields::unsupported("init_lora_weights", &value))))?;
        self.unset(&MORE_THAN_PRODUCTS)
    }

    fn unset(&self, settings: &[&'static str]) -> Result<()> {
        let set = |&field: &&'static str| Some((field, self.config.get(field).filter(|value| config_fields::is_set(value))?));
        settings
            .iter()
            .find_map(set)
            .map_or(Ok(()), |(field, value)| Err(at(&self.dir, config_fields::unsupported(field, value))))
    }

    /// The element type of all factors, or `f32` if they differ.
    pub fn dtype(&self) -> DType {
        let mut dtypes = self.modules.values().map(|factors| factors.dtype);
        let first = dtypes.next().unwrap_or(DType::F32);
        if dtypes.all(|dtype| dtype == first) { first } else { DType::F32 }
    }

    /// The update of one linear layer, on a device: factors `r×k` and `n×r`, and, if the settings include them, the bias of the
    /// update, the magnitudes and the layer's new bias. For [`LoraLinear::new`](crate::nn::LoraLinear::new) or
    /// [`insert`](crate::nn::LoraLinear::insert).
    ///
    /// `module` is the name of the layer in the folder, such as `model.layers.0.self_attn.q_proj`; `base` is the layer, with a
    /// weight `n×k`. For the initialisations `pissa` and `olora` it is the equivalent plain update of twice the rank, see
    /// [`Principal`](super::Principal). Layers that the folder holds whole are in [`extras`](Self::extras).
    ///
    /// Errors: [`Error::NoSuchLayer`] if the folder has no update of that name; [`Error::File`] for tensors that do not fit the
    /// layer, or elements that overflow the backend's element type; [`Error::Unsupported`] for `pissa` and `olora` without the
    /// feature `svd`.
    pub fn adapter<B: Backend>(&self, backend: &B, module: &str, base: &Linear<B>) -> Result<Adapter<B>> {
        let factors = self.modules.get(module).ok_or_else(|| self.no_such_layer(module))?;
        let config = self.config.lora_config(module).filter(|_| *self.kind(module) == Kind::Linear);
        let config = config.ok_or_else(|| self.no_such_layer(module))?;
        let others = ["lora_magnitude_vector", "lora_B.bias", "base_layer.bias"].map(|end| format!("{module}.{end}"));
        let others = others.into_iter().filter_map(|name| Some((name.clone(), self.extras.get(&name)?.tensor.clone())));
        let tensors = Kind::Linear.stored(module, factors).into_iter().chain(others).collect();
        layer_tensors::adapter((backend, tensors), (module, base), config, self.config.principal())
    }

    fn no_such_layer(&self, module: &str) -> Error {
        const SHOWN: usize = 8;
        let mut known: Vec<&str> = self.modules.keys().take(SHOWN).map(String::as_str).collect();
        if self.modules.len() > SHOWN {
            known.push("…");
        }
        Error::NoSuchLayer { name: module.into(), known: known.join(", ") }
    }

    /// The number of elements of all tensors.
    pub fn parameters(&self) -> usize {
        let extras: usize = self.extras.values().map(|extra| extra.tensor.values.len()).sum();
        self.modules.values().map(Factors::parameters).sum::<usize>() + extras
    }

    /// Writes the folder as PEFT would: both files completely, or neither. A missing folder is created.
    ///
    /// Errors: [`Error::File`], also for an element that overflows the stored element type.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let factors = self.modules.iter().flat_map(|(name, factors)| self.kind(name).stored(name, factors));
        let extras = self.extras.iter().map(|(name, extra)| (name.clone(), extra.tensor.clone()));
        publish(&[(dir.into(), &self.config, factors.chain(extras).collect())])
    }
}

/// The settings for modules of these ranks and alphas: `r` and `lora_alpha` from the first module of the largest rank, and
/// patterns for the modules that differ.
pub(super) fn settings(modules: &BTreeMap<String, (usize, Value)>) -> Vec<(&'static str, Value)> {
    let r = modules.values().map(|(rank, _)| *rank).max().unwrap_or(0);
    let usual = modules.values().find(|(rank, _)| *rank == r).map_or(Value::Null, |(_, alpha)| alpha.clone());
    let others = |setting: fn(&(usize, Value)) -> Value, usual: &Value| -> Map<String, Value> {
        let settings = modules.iter().map(|(name, module)| (name.clone(), setting(module)));
        settings.filter(|(_, setting)| setting != usual).collect()
    };
    vec![
        ("alpha_pattern", json!(others(|(_, alpha)| alpha.clone(), &usual))),
        ("init_lora_weights", json!(true)),
        ("rank_pattern", json!(others(|(rank, _)| json!(rank), &json!(r)))),
        ("lora_alpha", usual),
        ("r", json!(r)),
        ("target_modules", modules.keys().cloned().collect()),
        ("use_rslora", json!(false)),
    ]
}

/// The ends of the names of factors, for every kind of module. Both `A` and `B` are listed, so that a file with only one is
/// refused.
const FACTORS: [&str; 4] = [".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B"];

/// The module whose factors have this name in the file. For `target_parameters` it is the name of the parameter, with the number
/// of other updates that are nested in this one.
fn parameter(config: &AdapterConfig, name: &str) -> Result<(String, Option<usize>)> {
    let module = name.trim_end_matches(".base_layer");
    let (nested, parameters) = ((name.len() - module.len()) / ".base_layer".len(), config.parameters(module)?);
    match parameters.as_slice() {
        [] => Ok((name.into(), None)),
        ["weight"] if nested == 0 => Ok((name.into(), None)),
        parameters => {
            // The innermost update belongs to the parameter that was registered first.
            let parameter = parameters.len().checked_sub(nested + 1).and_then(|at| parameters.get(at));
            let parameter = parameter.ok_or_else(|| bad_tensors(format!("`{name}` is none of the `target_parameters`")))?;
            Ok((format!("{module}.{parameter}"), Some(nested)))
        }
    }
}

/// The roles of the tensors that are not factors. Errors: [`Error::File`] for a tensor that the settings do not include, and for
/// one that they require and that is missing.
fn extras(config: &AdapterConfig, modules: &BTreeMap<String, Factors>, tensors: HostTensors) -> Result<BTreeMap<String, Extra>> {
    let mut extras = BTreeMap::new();
    for (name, tensor) in tensors {
        let Some((role, target)) = role(config, &name) else {
            return Err(unknown(&name));
        };
        extras.insert(name, Extra { role, target, tensor });
    }
    for (module, factors) in modules {
        let Some(update) = config.lora_config(module) else { continue };
        let n = factors.b.rows();
        for (end, required) in
            [("lora_magnitude_vector", update.use_dora), ("lora_B.bias", update.lora_bias), ("base_layer.bias", false)]
        {
            let name = format!("{module}.{end}");
            match extras.get(&name) {
                Some(extra) if extra.tensor.values.len() != n => {
                    return Err(bad_tensors(format!("`{name}` is {}, want {n}", dimensions(&extra.tensor.shape))));
                }
                None if required => return Err(bad_tensors(format!("`{name}` is missing, want {n}"))),
                _ => {}
            }
        }
    }
    let need_factors = [Role::Magnitude, Role::AddToBias];
    let incomplete = |extra: &Extra| need_factors.contains(&extra.role) && !modules.contains_key(module_of(&extra.target));
    match extras.iter().find(|(_, extra)| incomplete(extra)) {
        Some((name, _)) => Err(bad_tensors(format!("`{name}` needs the factors of its module, which are missing"))),
        None => Ok(extras),
    }
}

/// `scaling·r` in `f64`, so that dividing it by r gives exactly the scaling, in PEFT as well as here.
fn lora_alpha(module: &Factors) -> Value {
    number(f64::from(module.scaling) * module.rank() as f64)
}

/// The rank and the scaling that the settings give to a module, or to a parameter.
fn rank_and_scaling(config: &AdapterConfig, name: &str, parameter: Option<usize>) -> Result<(usize, f32)> {
    // With tied weights, PEFT stores the update of the embedding once more under the name of the head.
    let tied =
        config.ensures_weight_tying() && name.rsplit('.').next().is_some_and(|last| ["lm_head", "embed_out"].contains(&last));
    let update = (parameter.is_some() || tied).then(|| config.settings(name)).or_else(|| config.lora_config(name));
    let update = update.ok_or_else(|| bad_tensors(format!("`{name}` is not one of the `target_modules` in {CONFIG_FILE}")))?;
    config.check(name, &update)?;
    Ok((update.rank, update.scaling.of(update.alpha, update.rank)))
}

fn unless(holds: bool, got: String, want: &'static str) -> Result<()> {
    Error::unless(holds, "adapter", "modules", got, want)
}
