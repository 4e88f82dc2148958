//! An adapter as its folder holds it: settings and factors in host memory, without a model.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::config::number;
use super::extra::{Extra, Role, role, unknown};
use super::kind::{self, Kind};
use super::matrix::HostMatrix;
use super::spelling::respelled;
use super::tensors::{HostTensors, parse_tensors, refused, spell};
use super::{AdapterConfig, CONFIG_FILE, TENSORS_FILE, at, fields, formats, parts, publish};
use crate::backend::Backend;
use crate::element::DType;
use crate::error::{Error, Result};
use crate::file;
use crate::nn::{Adapter, Linear};

/// Settings that make more of the factors than `scaling·B·A` of one matrix.
const MORE_THAN_PRODUCTS: [&str; 3] = ["lora_bias", "target_parameters", "use_dora"];
/// Settings that put tensors into a folder that take the place of the model's.
const BESIDE_FACTORS: [&str; 3] = ["bias", "modules_to_save", "trainable_token_indices"];

/// `ΔW = scaling·B·A` of one module.
#[derive(Clone, Debug, PartialEq)]
pub struct Factors {
    /// `r×k`
    pub a: HostMatrix,
    /// `n×r`
    pub b: HostMatrix,
    /// `lora_alpha / r`, or what the settings make of it.
    pub scaling: f32,
    /// How the factors are stored.
    pub dtype: DType,
}

impl Factors {
    /// The rank.
    pub fn rank(&self) -> usize {
        self.a.rows()
    }

    /// How many numbers both factors have.
    pub fn parameters(&self) -> usize {
        self.a.values().len() + self.b.values().len()
    }
}

/// An adapter folder in host memory: every module's factors by name (`model.layers.0.self_attn.q_proj`), what it holds beside
/// them (DoRA's magnitudes, biases, whole modules), and the settings.
#[derive(Clone, Debug)]
pub struct Folder {
    /// Where it was read, for errors.
    dir: PathBuf,
    config: AdapterConfig,
    modules: BTreeMap<String, Factors>,
    /// The kinds of the modules that are no linear layers.
    kinds: BTreeMap<String, Kind>,
    extras: BTreeMap<String, Extra>,
}

impl Folder {
    /// Reads a folder as PEFT writes it, or an adapter in another [format](formats) that tells all there is to know, such as mlx-lm's.
    ///
    /// Errors: [`Error::File`] for a file that is missing or damaged, a tensor that the settings do not know of, or one they ask for
    /// that is missing or of another shape; [`Error::Unsupported`] for a setting that this crate does not know how to honour.
    pub fn read(dir: &Path) -> Result<Self> {
        let read = || {
            let (config, tensors) = (file::read(&dir.join(CONFIG_FILE))?, file::read(&dir.join(TENSORS_FILE))?);
            let parsed = Self::parse(&config, &tensors).map_err(|error| at(dir, error))?;
            Ok(Self { dir: dir.into(), ..parsed })
        };
        read().or_else(|error| formats::foreign(dir, error))
    }

    /// Reads the bytes of the two files. Errors: those of [`read`](Self::read).
    pub fn parse(config: &[u8], tensors: &[u8]) -> Result<Self> {
        let (config, tensors) = (AdapterConfig::from_json(config)?, parse_tensors(tensors)?);
        let mut tensors = respelled(tensors)?;
        let factor = |name: &String| FACTORS.iter().find_map(|factor| Some(name.strip_suffix(factor)?.to_string()));
        let names: BTreeSet<String> = tensors.keys().filter_map(factor).collect();
        let (mut modules, mut kinds) = (BTreeMap::new(), BTreeMap::new());
        for name in names {
            let (name, parameter) = parameter(&config, &name)?;
            let settings = told(&config, &name, parameter)?;
            let (kind, factors) = kind::read(&mut tensors, &name, parameter, settings)?;
            if kind != Kind::Linear {
                kinds.insert(name.clone(), kind);
            }
            modules.insert(name, factors);
        }
        let extras = extras(&config, &modules, tensors)?;
        if modules.is_empty() && extras.is_empty() {
            return Err(refused("holds no adapter".into()));
        }
        Ok(Self { dir: PathBuf::new(), config, modules, kinds, extras })
    }

    /// Modules under settings that say their ranks and scalings: `lora_alpha = scaling·r`, and `rank_pattern` and `alpha_pattern` for
    /// those that differ from the first of the greatest rank. All else is as `template` has it, or PEFT's default.
    ///
    /// Errors: [`Error::Value`] for no module, for factors that do not fit, a scaling that is not finite, or names that no settings
    /// tell apart.
    pub fn new(template: Option<&AdapterConfig>, modules: BTreeMap<String, Factors>) -> Result<Self> {
        let r = modules.values().map(Factors::rank).max().unwrap_or(0);
        unless(r > 0, format!("{} modules of rank {r}", modules.len()), "at least one module, of rank 1 or more")?;
        for (name, Factors { scaling, .. }) in &modules {
            unless(scaling.is_finite(), format!("`{name}` of scaling {scaling}"), "of finite scalings")?;
        }
        let settings = settings(&modules.iter().map(|(name, m)| (name.clone(), (m.rank(), lora_alpha(m)))).collect());
        let config = match template {
            Some(template) => template.with(settings)?,
            None => AdapterConfig::beside_defaults(settings)?,
        };
        Self::from_config(config, modules)
    }

    /// Modules under settings that tell the rank and the scaling of each already.
    ///
    /// Errors: [`Error::Value`] for no module, for factors that do not fit, and for a module of which the settings tell something else.
    pub fn from_config(config: AdapterConfig, modules: BTreeMap<String, Factors>) -> Result<Self> {
        unless(!modules.is_empty(), "none".into(), "at least one module")?;
        let folder = Self { dir: PathBuf::new(), config, modules, kinds: BTreeMap::new(), extras: BTreeMap::new() };
        folder.tells()?;
        Ok(folder)
    }

    /// Errors: [`Error::Value`] unless the settings tell the rank and the scaling of every module, and its factors have that rank.
    fn tells(&self) -> Result<()> {
        for (name, Factors { a, b, scaling, .. }) in &self.modules {
            unless(a.rows() == b.cols(), format!("`{name}` with A {} and B {}", a.shape(), b.shape()), "A r×k and B n×r")?;
            let (rank, told) = told(&self.config, name, None)?;
            let tells = rank == a.rows() && told == *scaling;
            unless(tells, format!("`{name}` of rank {}, scaling {scaling}", a.rows()), "told from others by its name")?;
        }
        Ok(())
    }

    /// The same folder, whose modules are of these kinds.
    pub(super) fn of_kinds(self, kinds: BTreeMap<String, Kind>) -> Self {
        Self { kinds, ..self }
    }

    /// The same folder, for a model that stores the weights of linear layers `in × out`.
    #[cfg(all(feature = "checkpoint", feature = "svd"))]
    pub(crate) fn stored_in_out(self) -> Result<Self> {
        Ok(Self { config: self.config.with([("fan_in_fan_out", json!(true))])?, ..self })
    }

    /// The same folder, with what another one holds beside factors.
    #[cfg(feature = "svd")]
    pub(super) fn with_extras(self, other: &Self) -> Self {
        Self { extras: other.extras.clone(), ..self }
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

    /// The kinds of the modules that are no linear layers.
    #[cfg(feature = "svd")]
    pub(super) fn kinds(&self) -> &BTreeMap<String, Kind> {
        &self.kinds
    }

    /// Whether merging it would leave every weight as it is: every `B` or `A` is zero, and there is nothing beside factors.
    pub fn changes_nothing(&self) -> bool {
        let zero = |matrix: &HostMatrix| matrix.values().iter().all(|&value| value == 0.0);
        self.extras.is_empty() && self.modules.values().all(|factors| zero(&factors.a) || zero(&factors.b))
    }

    /// What it holds beside factors, by the name of the tensor in its file.
    pub fn extras(&self) -> &BTreeMap<String, Extra> {
        &self.extras
    }

    /// Errors: [`Error::Unsupported`] if the factors do not tell all that the adapter does.
    pub(super) fn only_factors(&self) -> Result<()> {
        self.unset(&BESIDE_FACTORS)?;
        let extra = self.extras.keys().next();
        extra
            .map_or(Ok(()), |name| Err(refused(format!("`{name}` is there beside the factors, which is not supported here"))))?;
        self.only_products()
    }

    /// Errors: [`Error::Unsupported`] if a module does something else than add `scaling·B·A`.
    pub(super) fn only_products(&self) -> Result<()> {
        // One that began with a part of the weights took it out of them: its factors alone belong to other weights.
        let began = self.config.began_with().map(|part| json!(part.name()));
        began.map_or(Ok(()), |value| Err(at(&self.dir, fields::unsupported("init_lora_weights", &value))))?;
        self.unset(&MORE_THAN_PRODUCTS)
    }

    fn unset(&self, settings: &[&'static str]) -> Result<()> {
        let set = |&field: &&'static str| Some((field, self.config.get(field).filter(|value| fields::is_set(value))?));
        settings.iter().find_map(set).map_or(Ok(()), |(field, value)| Err(at(&self.dir, fields::unsupported(field, value))))
    }

    /// The element type of all factors, or `f32` where they differ.
    pub fn dtype(&self) -> DType {
        let mut dtypes = self.modules.values().map(|factors| factors.dtype);
        let first = dtypes.next().unwrap_or(DType::F32);
        if dtypes.all(|dtype| dtype == first) { first } else { DType::F32 }
    }

    /// The update of a layer of one's own, on a device: factors `r×k` and `n×r`, and the bias of the update, the magnitudes and the
    /// layer's new bias where the settings ask for them. For [`LoraLinear::new`](crate::nn::LoraLinear::new) or
    /// [`insert`](crate::nn::LoraLinear::insert).
    ///
    /// `module` is the name that the layer has in the folder, such as `model.layers.0.self_attn.q_proj`; `base` is the layer, with a
    /// weight `n×k`. An adapter that began with a part of the weight comes as the plain one of twice the rank, see
    /// [`Principal`](super::Principal). Layers that the folder holds whole are in [`extras`](Self::extras).
    ///
    /// Errors: [`Error::NoSuchLayer`] if the folder has no update of that name; [`Error::File`] for tensors that do not fit the layer
    /// or hold more than the backend's element type can; [`Error::Unsupported`] for `pissa` and `olora` without the feature `svd`.
    pub fn adapter<B: Backend>(&self, backend: &B, module: &str, base: &Linear<B>) -> Result<Adapter<B>> {
        let factors = self.modules.get(module).ok_or_else(|| self.lacks(module))?;
        let asked = self.config.lora_config(module).filter(|_| *self.kind(module) == Kind::Linear);
        let asked = asked.ok_or_else(|| self.lacks(module))?;
        let beside = ["lora_magnitude_vector", "lora_B.bias", "base_layer.bias"].map(|end| format!("{module}.{end}"));
        let beside = beside.into_iter().filter_map(|name| Some((name.clone(), self.extras.get(&name)?.tensor.clone())));
        let tensors = Kind::Linear.stored(module, factors).into_iter().chain(beside).collect();
        parts::adapter((backend, tensors), (module, base), asked, self.config.began_with())
    }

    fn lacks(&self, module: &str) -> Error {
        const SHOWN: usize = 8;
        let mut known: Vec<&str> = self.modules.keys().take(SHOWN).map(String::as_str).collect();
        if self.modules.len() > SHOWN {
            known.push("…");
        }
        Error::NoSuchLayer { name: module.into(), known: known.join(", ") }
    }

    /// How many numbers it holds.
    pub fn parameters(&self) -> usize {
        let extras: usize = self.extras.values().map(|extra| extra.tensor.values.len()).sum();
        self.modules.values().map(Factors::parameters).sum::<usize>() + extras
    }

    /// Writes the folder as PEFT would, both files whole or not at all; makes the folder if it is not there.
    ///
    /// Errors: [`Error::File`], also for a number that the stored element type cannot hold.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let factors = self.modules.iter().flat_map(|(name, factors)| self.kind(name).stored(name, factors));
        let extras = self.extras.iter().map(|(name, extra)| (name.clone(), extra.tensor.clone()));
        publish(&[(dir.into(), &self.config, factors.chain(extras).collect())])
    }
}

/// The settings that tell the rank and the `lora_alpha` of every module: those of the first of the greatest rank for all, and patterns
/// for the others.
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

/// The ends of the names of the first factors, for every kind of module, and of the second, which must not be there alone.
const FACTORS: [&str; 4] = [".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B"];

/// The module whose factors have this name in the file. If the update is one of a parameter: the parameter, and how many other
/// updates are nested in this one.
fn parameter(config: &AdapterConfig, name: &str) -> Result<(String, Option<usize>)> {
    let module = name.trim_end_matches(".base_layer");
    let (nested, parameters) = ((name.len() - module.len()) / ".base_layer".len(), config.parameters(module)?);
    match parameters.as_slice() {
        [] => Ok((name.into(), None)),
        ["weight"] if nested == 0 => Ok((name.into(), None)),
        parameters => {
            // The update that lies the deepest in the nest is that of the parameter that was registered first.
            let parameter = parameters.len().checked_sub(nested + 1).and_then(|at| parameters.get(at));
            let parameter = parameter.ok_or_else(|| refused(format!("`{name}` is none of the `target_parameters`")))?;
            Ok((format!("{module}.{parameter}"), Some(nested)))
        }
    }
}

/// What the tensors are that are no factors: all of them known to the settings, none missing that they ask of every module.
fn extras(config: &AdapterConfig, modules: &BTreeMap<String, Factors>, tensors: HostTensors) -> Result<BTreeMap<String, Extra>> {
    let mut extras = BTreeMap::new();
    for (name, tensor) in tensors {
        let Some((role, target)) = role(config, &name) else {
            return Err(unknown(&name));
        };
        extras.insert(name, Extra { role, target, tensor });
    }
    for (module, factors) in modules {
        let Some(told) = config.lora_config(module) else { continue };
        let n = factors.b.rows();
        for (end, asked) in
            [("lora_magnitude_vector", told.use_dora), ("lora_B.bias", told.lora_bias), ("base_layer.bias", false)]
        {
            let name = format!("{module}.{end}");
            match extras.get(&name) {
                Some(extra) if extra.tensor.values.len() != n => {
                    return Err(refused(format!("`{name}` is {}, want {n}", spell(&extra.tensor.shape))));
                }
                None if asked => return Err(refused(format!("`{name}` is missing, want {n}"))),
                _ => {}
            }
        }
    }
    let needs = [Role::Magnitude, Role::Plus];
    let alone = |extra: &Extra| needs.contains(&extra.role) && !modules.contains_key(module_of(&extra.target));
    match extras.iter().find(|(_, extra)| alone(extra)) {
        Some((name, _)) => Err(refused(format!("`{name}` is there without the factors of its module"))),
        None => Ok(extras),
    }
}

/// The module that a weight or a bias belongs to.
pub(crate) fn module_of(tensor: &str) -> &str {
    tensor.rsplit_once('.').map_or(tensor, |(module, _)| module)
}

/// `scaling·r`: a number of `f64`, so that dividing it by r once more gives the scaling to the bit, in PEFT as here.
fn lora_alpha(module: &Factors) -> Value {
    number(f64::from(module.scaling) * module.rank() as f64)
}

/// The rank and the scaling that the settings tell of a module, or of a parameter.
fn told(config: &AdapterConfig, name: &str, parameter: Option<usize>) -> Result<(usize, f32)> {
    let told = parameter.map(|_| config.settings(name)).or_else(|| config.lora_config(name));
    let told = told.ok_or_else(|| refused(format!("`{name}` is not one of the `target_modules` in {CONFIG_FILE}")))?;
    config.check(name, &told)?;
    Ok((told.rank, told.scaling.of(told.alpha, told.rank)))
}

fn unless(holds: bool, got: String, want: &'static str) -> Result<()> {
    Error::unless(holds, "adapter", "modules", got, want)
}
