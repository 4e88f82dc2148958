//! An adapter as its folder holds it: settings and factors in host memory, without a model.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize as to_safetensors};
use serde_json::{Map, Value, json};

use super::matrix::HostMatrix;
use super::tensors::{PREFIX, key, little_endian, narrow, refused, widen};
use super::{AdapterConfig, CONFIG_FILE, TENSORS_FILE, at, fields};
use crate::element::{DType, bf16, f16};
use crate::error::{Error, Result};
use crate::file::{self, Staged};

/// Settings that put more into a folder than factors, or make more of them than `scaling·B·A`.
const MORE_THAN_FACTORS: [&str; 5] = ["bias", "fan_in_fan_out", "lora_bias", "modules_to_save", "use_dora"];

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

/// An adapter folder in host memory: every module's factors by name (`model.layers.0.self_attn.q_proj`), and the settings.
///
/// What a folder holds beside factors (DoRA's magnitudes, biases, whole modules) is refused by name, never dropped.
#[derive(Clone, Debug)]
pub struct Folder {
    config: AdapterConfig,
    modules: BTreeMap<String, Factors>,
}

impl Folder {
    /// Reads a folder as PEFT writes it.
    ///
    /// Errors: [`Error::File`] for a file that is missing or damaged, or a tensor that is not a factor of a module that the
    /// settings target, of the rank they give it; [`Error::Unsupported`] for a setting that factors do not tell.
    pub fn read(dir: &Path) -> Result<Self> {
        let (config, tensors) = (file::read(&dir.join(CONFIG_FILE))?, file::read(&dir.join(TENSORS_FILE))?);
        Self::parse(&config, &tensors).map_err(|error| at(dir, error))
    }

    /// Reads the bytes of the two files. Errors: those of [`read`](Self::read).
    pub fn parse(config: &[u8], tensors: &[u8]) -> Result<Self> {
        let config = AdapterConfig::from_json(config)?;
        factors_tell_all(&config)?;
        let mut modules = BTreeMap::new();
        for (name, [a, b]) in pairs(tensors)? {
            let (a, b) = (present(&name, "lora_A", a)?, present(&name, "lora_B", b)?);
            let factors = checked(&config, &name, a, b)?;
            modules.insert(name, factors);
        }
        if modules.is_empty() {
            return Err(refused("holds no adapter".into()));
        }
        Ok(Self { config, modules })
    }

    /// Modules whose scaling is 1, under settings that say so: `lora_alpha = r`. All else is as `template` has it, or PEFT's
    /// default. Errors: [`Error::Value`] for no module, for factors that do not fit, or for names that no settings tell apart.
    pub fn new(template: Option<&AdapterConfig>, modules: BTreeMap<String, Factors>) -> Result<Self> {
        let r = modules.values().map(Factors::rank).max().unwrap_or(0);
        unless(r > 0, format!("{} modules of rank {r}", modules.len()), "at least one module, of rank 1 or more")?;
        let ranks: Map<String, Value> =
            modules.iter().filter(|(_, m)| m.rank() != r).map(|(name, m)| (name.clone(), json!(m.rank()))).collect();
        let settings = [
            ("alpha_pattern", json!(ranks)),
            ("init_lora_weights", json!(true)),
            ("lora_alpha", json!(r)),
            ("r", json!(r)),
            ("rank_pattern", json!(ranks)),
            ("target_modules", modules.keys().cloned().collect()),
            ("use_rslora", json!(false)),
        ];
        let config = match template {
            Some(template) => template.with(settings)?,
            None => AdapterConfig::new(settings)?,
        };
        for (name, Factors { a, b, scaling, .. }) in &modules {
            unless(a.rows() == b.cols(), format!("`{name}` with A {} and B {}", a.shape(), b.shape()), "A r×k and B n×r")?;
            let (rank, told) = told(&config, name)?;
            let tells = rank == a.rows() && told == 1.0 && *scaling == 1.0;
            unless(tells, format!("`{name}` of rank {}, scaling {scaling}", a.rows()), "scaling 1, and a name of its own")?;
        }
        Ok(Self { config, modules })
    }

    /// The settings.
    pub fn config(&self) -> &AdapterConfig {
        &self.config
    }

    /// The factors, by the name of the module.
    pub fn modules(&self) -> &BTreeMap<String, Factors> {
        &self.modules
    }

    /// The element type of all factors, or `f32` where they differ.
    pub fn dtype(&self) -> DType {
        let mut dtypes = self.modules.values().map(|factors| factors.dtype);
        let first = dtypes.next().unwrap_or(DType::F32);
        if dtypes.all(|dtype| dtype == first) { first } else { DType::F32 }
    }

    /// How many numbers all factors have.
    pub fn parameters(&self) -> usize {
        self.modules.values().map(Factors::parameters).sum()
    }

    /// Writes the folder as PEFT would, both files whole or not at all; makes the folder if it is not there.
    ///
    /// Errors: [`Error::File`], also for a number that the stored element type cannot hold.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let bytes = self.serialize().map_err(|error| at(dir, error))?;
        let created = std::fs::create_dir_all(dir);
        created.map_err(|error| Error::File { path: dir.into(), reason: error.to_string() })?;
        let json = self.config.to_json();
        let staged = [Staged::new(&dir.join(TENSORS_FILE), &bytes)?, Staged::new(&dir.join(CONFIG_FILE), json.as_bytes())?];
        staged.into_iter().try_for_each(Staged::publish)
    }

    fn serialize(&self) -> Result<Vec<u8>> {
        let mut data = Vec::new();
        for (name, factors) in &self.modules {
            for (which, matrix) in [("lora_A", &factors.a), ("lora_B", &factors.b)] {
                let name = format!("{PREFIX}{}", key(name, which));
                let (dtype, bytes) = stored(&name, factors.dtype, matrix.values())?;
                data.push((name, dtype, vec![matrix.rows(), matrix.cols()], bytes));
            }
        }
        let view = |(name, dtype, shape, bytes)| TensorView::new(dtype, shape, bytes).map(|view| (name, view));
        let views: Result<Vec<_>, _> =
            data.iter().map(|(name, dtype, shape, bytes)| view((name, *dtype, shape.clone(), bytes))).collect();
        let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
        views.and_then(|views| to_safetensors(views, Some(metadata))).map_err(|error| refused(error.to_string()))
    }
}

/// Refuses what would be lost, or be told wrongly, if only the factors were looked at.
fn factors_tell_all(config: &AdapterConfig) -> Result<()> {
    let set = |field: &'static str| Some((field, config.get(field).filter(|value| fields::is_set(value))?));
    if let Some((field, value)) = MORE_THAN_FACTORS.into_iter().find_map(set) {
        return Err(fields::unsupported(field, value));
    }
    // `pissa` and its kin took the first factors out of the base weights: the adapter belongs to another base.
    match config.get("init_lora_weights") {
        Some(Value::String(name)) if !["gaussian", "orthogonal"].contains(&name.to_lowercase().as_str()) => {
            Err(fields::unsupported("init_lora_weights", &json!(name)))
        }
        _ => Ok(()),
    }
}

type Stored = Option<(DType, HostMatrix)>;

/// Both factors of every module, as far as they are there. Errors: [`Error::File`] for any other tensor.
fn pairs(bytes: &[u8]) -> Result<BTreeMap<String, [Stored; 2]>> {
    let file = SafeTensors::deserialize(bytes).map_err(|error| refused(error.to_string()))?;
    let mut pairs: BTreeMap<String, [Stored; 2]> = BTreeMap::new();
    for (full, view) in file.iter() {
        let short = full.strip_prefix(PREFIX).unwrap_or(full);
        let factor = |which: &str| short.strip_suffix(".weight")?.strip_suffix(which)?.strip_suffix('.');
        let (module, which) = match (factor("lora_A"), factor("lora_B")) {
            (Some(module), _) => (module, 0),
            (_, Some(module)) => (module, 1),
            _ => {
                return Err(refused(format!("`{full}` is not supported, want lora_A.weight and lora_B.weight of modules alone")));
            }
        };
        let &[rows, cols] = view.shape() else {
            return Err(refused(format!("`{full}` has {} dimensions, want 2", view.shape().len())));
        };
        let dtype = match view.dtype() {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            other => return Err(refused(format!("`{full}` holds {other:?}, want F32, F16 or BF16"))),
        };
        let values = widen(view.dtype(), view.data()).unwrap_or_default(); // each of the three can be widened
        let slot = &mut pairs.entry(module.into()).or_default()[which];
        if slot.replace((dtype, HostMatrix::new((rows, cols), values)?)).is_some() {
            return Err(refused(format!("`{short}` is there twice, with and without `{PREFIX}`")));
        }
    }
    Ok(pairs)
}

fn present(module: &str, which: &str, stored: Stored) -> Result<(DType, HostMatrix)> {
    stored.ok_or_else(|| refused(format!("`{}` is missing", key(module, which))))
}

/// The factors, if they are of the rank that the settings tell.
fn checked(config: &AdapterConfig, name: &str, a: (DType, HostMatrix), b: (DType, HostMatrix)) -> Result<Factors> {
    let (rank, scaling) = told(config, name)?;
    let dtype = if a.0 == b.0 { a.0 } else { DType::F32 };
    let (a, b) = (a.1, b.1);
    for (which, got, want) in [("lora_A", a.shape(), (rank, a.cols()).into()), ("lora_B", b.shape(), (b.rows(), rank).into())] {
        if got != want {
            return Err(refused(format!("`{}` is {got}, want {want}", key(name, which))));
        }
    }
    Ok(Factors { a, b, scaling, dtype })
}

/// The rank and the scaling that the settings tell of a module.
fn told(config: &AdapterConfig, name: &str) -> Result<(usize, f32)> {
    let told = config.lora_config(name);
    let told = told.ok_or_else(|| refused(format!("`{name}` is not one of the `target_modules` in {CONFIG_FILE}")))?;
    told.check()?;
    Ok((told.rank, told.scaling.of(told.alpha, told.rank)))
}

/// The bytes of these numbers in a file. Errors: [`Error::File`] where a finite number becomes infinite.
fn stored(name: &str, dtype: DType, values: &[f32]) -> Result<(Dtype, Vec<u8>)> {
    Ok(match dtype {
        DType::F32 => (Dtype::F32, little_endian(values)),
        DType::F16 => (Dtype::F16, little_endian(&narrow::<f16>(name, values)?)),
        DType::BF16 => (Dtype::BF16, little_endian(&narrow::<bf16>(name, values)?)),
    })
}

fn unless(holds: bool, got: String, want: &'static str) -> Result<()> {
    Error::unless(holds, "adapter", "modules", got, want)
}
