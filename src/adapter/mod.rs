//! Adapter folders as PEFT writes them: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! ```
//! use lowrank::nn::{Adaptable, LoraConfig, Mlp, Targets};
//! use lowrank::{Cpu, adapter, random::Rng};
//!
//! let cpu = Cpu::<f32>::new()?;
//! let mut model = Mlp::new(&cpu, &[8, 6, 4], &mut Rng::new(0))?;
//! model.add_adapters(&cpu, Targets::All, &LoraConfig::new(2, 4.0), &mut Rng::new(1))?;
//! # let folder = tempfile::tempdir().unwrap();
//! # let dir = folder.path();
//! adapter::save(&cpu, &model, dir)?;
//!
//! let mut other = Mlp::new(&cpu, &[8, 6, 4], &mut Rng::new(0))?;
//! adapter::load(&cpu, &mut other, dir)?;
//! assert_eq!(model.parameter_report(), other.parameter_report());
//! # Ok::<(), lowrank::Error>(())
//! ```
//!
//! Adapters can also be loaded one layer at a time, by the names that the folder has for the layers:
//!
//! ```
//! use lowrank::adapter::Folder;
//! use lowrank::nn::{Linear, LoraLinear};
//! use lowrank::{Cpu, random::Rng};
//!
//! # use lowrank::{DType, adapter::{Factors, HostMatrix}};
//! # let temporary = tempfile::tempdir().unwrap();
//! # let dir = temporary.path();
//! # let (a, b) = (HostMatrix::new((2, 8), vec![0.5; 16])?, HostMatrix::new((4, 2), vec![0.25; 8])?);
//! # let factors = Factors { a, b, scaling: 2.0, dtype: DType::F32 };
//! # Folder::new(None, [("model.layers.0.self_attn.q_proj".to_string(), factors)].into())?.write(dir)?;
//! let cpu = Cpu::<f32>::new()?;
//! let q_proj = Linear::new(&cpu, 8, 4, &mut Rng::new(0))?; // a layer of your model, with 8 inputs and 4 outputs
//!
//! let folder = Folder::read(dir)?; // as PEFT wrote it
//! let adapter = folder.adapter(&cpu, "model.layers.0.self_attn.q_proj", &q_proj)?;
//! let mut q_proj = LoraLinear::new(q_proj, adapter)?; // forward() on a tape, merge(), unmerge()
//! q_proj.merge(&cpu)?;
//! # assert_eq!(q_proj.adapter(lowrank::nn::DEFAULT).unwrap().scaling(), 2.0);
//! # Ok::<(), lowrank::Error>(())
//! ```

mod bank;
mod combine;
#[cfg(feature = "svd")]
mod compress;
mod config;
mod config_fields;
pub(crate) mod convert_elements;
#[cfg(feature = "svd")]
mod decompose;
mod extra_tensors;
mod factors;
mod files;
mod folder;
pub mod formats;
mod kind;
mod layer_tensors;
mod matrix;
mod modules;
mod pattern;
#[cfg(feature = "svd")]
mod principal;
mod publish;
#[cfg(feature = "svd")]
mod randomized_svd;
mod spelling;
mod tensor_file;
mod tensors;
mod ties_dare;

use std::path::{Path, PathBuf};

pub use combine::{CombinationType, Combine, combine};
#[cfg(feature = "svd")]
pub use compress::{compress, extract};
pub use config::{AdapterConfig, LayerTarget, TargetModules};
pub use config_fields::Principal;
#[cfg(all(feature = "checkpoint", feature = "svd"))]
pub(crate) use decompose::in_module;
#[cfg(feature = "svd")]
pub use decompose::{Keep, Svd, olora, pissa};
pub use extra_tensors::{Extra, Role};
pub use factors::Factors;
pub use files::{CONFIG_FILE, TENSORS_FILE};
pub use folder::Folder;
pub use kind::Kind;
pub use matrix::HostMatrix;
#[cfg(feature = "svd")]
pub use principal::init_from_weight;
pub(crate) use tensor_file::damage;
pub use tensor_file::parse_tensors;
#[cfg(feature = "checkpoint")]
pub(crate) use tensors::module_of;
pub use tensors::{HostTensor, HostTensors};
pub(crate) use tensors::{dimensions, float_type, stored_type};
pub use ties_dare::MajoritySign;

use files::at;
use publish::publish;

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::file;
use crate::nn::{Adaptable, DEFAULT, LayerAdapter, check_layers, check_unmerged};

/// Writes every adapter of a model as PEFT 0.21 would: `default` into the folder itself, each other one into a sub-folder of its
/// name.
///
/// Missing folders are created. Files are staged: either all are written completely, or none. Settings that a model does not
/// hold, such as `base_model_name_or_path`, get PEFT's defaults; [`save_with`] can set them. PEFT has no
/// [raw](crate::nn::Scaling::Raw) alpha, so the `lora_alpha` that gives the same scaling is written instead.
///
/// Errors: [`Error::Value`] for a model without adapters, or for an adapter whose layers differ in a setting that a config has
/// only once; [`Error::File`].
pub fn save<B: Backend>(backend: &B, model: &impl Adaptable<B>, dir: &Path) -> Result<()> {
    let names = model.adapter_names();
    Error::unless(!names.is_empty(), "save", "model", "no adapter", "at least one adapter")?;
    let configs =
        names.into_iter().map(|name| Ok((name, AdapterConfig::of_adapter(model, name)?))).collect::<Result<Vec<_>>>()?;
    write(backend, model, &configs, dir)
}

/// Writes one adapter of a model, as [`save`] does. Errors: those of [`save`], and [`Error::NoSuchAdapter`].
pub fn save_as<B: Backend>(backend: &B, model: &impl Adaptable<B>, name: &str, dir: &Path) -> Result<()> {
    model.check_adapters(&[name])?;
    write(backend, model, &[(name, AdapterConfig::of_adapter(model, name)?)], dir)
}

/// Writes the adapter `default` with the settings of `config`, for example a config that [`load`] returned. Settings that
/// disagree with the model are replaced by those of the model. Errors: those of [`save`].
///
/// ```
/// # use lowrank::nn::{Adaptable, LoraConfig, Mlp, Targets};
/// # use lowrank::{Cpu, adapter, adapter::AdapterConfig, random::Rng};
/// # let (cpu, mut rng, temporary) = (Cpu::<f32>::new()?, Rng::new(0), tempfile::tempdir().unwrap());
/// # let dir = temporary.path();
/// # let mut model = Mlp::new(&cpu, &[4, 3], &mut rng)?;
/// # model.add_adapters(&cpu, Targets::All, &LoraConfig::new(2, 4.0), &mut rng)?;
/// let config = AdapterConfig::of(&model)?.with_base_model_name_or_path("org/model").with_task_type("CAUSAL_LM");
/// adapter::save_with(&cpu, &model, &config, dir)?;
///
/// let loaded = adapter::load(&cpu, &mut model, dir)?; // to save the adapter again, pass this config
/// assert_eq!(loaded.base_model_name_or_path(), Some("org/model"));
/// # Ok::<(), lowrank::Error>(())
/// ```
pub fn save_with<B: Backend>(backend: &B, model: &impl Adaptable<B>, config: &AdapterConfig, dir: &Path) -> Result<()> {
    write(backend, model, &[(DEFAULT, config.updated(model)?)], dir)
}

/// The folder of an adapter's files: `dir` itself for `default`, and the sub-folder of its name for any other.
pub fn folder(dir: &Path, name: &str) -> PathBuf {
    if name == DEFAULT { dir.into() } else { dir.join(name) }
}

fn write<B: Backend>(backend: &B, model: &impl Adaptable<B>, configs: &[(&str, AdapterConfig)], dir: &Path) -> Result<()> {
    let tensors = |(name, config)| Ok((folder(dir, name), config, layer_tensors::write(backend, model, name)?));
    let folders = configs.iter().map(|(name, config)| tensors((name, config))).collect::<Result<Vec<_>>>()?;
    publish(&folders)
}

/// Freezes a model and loads the adapter of a folder as its only one, `default`. Returns the settings, which [`save_with`] takes.
///
/// Elements are rounded to the model's element type. An adapter that was initialised with a part of the weights (`pissa`,
/// `olora`) is loaded as the equivalent plain adapter of twice the rank, see [`Principal`]; the weights are not changed.
///
/// Errors: [`Error::File`] for a file that is missing, damaged or does not fit the model, and for a setting out of range;
/// [`Error::Unsupported`] for a setting that this crate does not support; [`Error::Value`] while an adapter is merged. The model
/// is not changed then.
pub fn load<B: Backend>(backend: &B, model: &mut impl Adaptable<B>, dir: &Path) -> Result<AdapterConfig> {
    let (config, parts) = read(backend, model, dir)?;
    check_unmerged(model, "load")?;
    check_layers(model, "load")?;
    model.unload()?;
    model.insert_adapter(DEFAULT, parts)?; // cannot fail: each part is for an existing layer and fits it
    Ok(config)
}

/// Freezes a model and adds the adapter of a folder under a name; an adapter of the same name is replaced. The first adapter of a
/// model is active at once; later ones need [`Adaptable::set_active`].
///
/// Errors: those of [`load`]; [`Error::Value`] for a name with a dot or a slash. The model is not changed then.
pub fn load_as<B: Backend>(backend: &B, model: &mut impl Adaptable<B>, name: &str, dir: &Path) -> Result<AdapterConfig> {
    let (config, parts) = read(backend, model, dir)?;
    check_unmerged(model, "load_as")?;
    model.insert_adapter(name, parts)?;
    Ok(config)
}

/// Overwrites an adapter of the model, in place, with the adapter of a folder. See [`Adaptable::swap_adapter`], also for what
/// happens to the scale and to an optimizer's moments.
///
/// Errors: those of [`load`] and of [`Adaptable::swap_adapter`]. The model is not changed then.
pub fn swap<B: Backend>(backend: &B, model: &mut impl Adaptable<B>, name: &str, dir: &Path) -> Result<AdapterConfig> {
    let (config, parts) = read(backend, model, dir)?;
    model.swap_adapter(backend, name, parts)?;
    Ok(config)
}

type Parts<B> = Vec<(String, LayerAdapter<B>)>;

fn read<B: Backend>(backend: &B, model: &impl Adaptable<B>, dir: &Path) -> Result<(AdapterConfig, Parts<B>)> {
    let read = || {
        let (config, tensors) = (file::read(&dir.join(CONFIG_FILE))?, file::read(&dir.join(TENSORS_FILE))?);
        let parse = || {
            let config = AdapterConfig::from_json(&config)?;
            let tensors = parse_tensors(&tensors).and_then(spelling::normalised)?;
            let parts = layer_tensors::read(backend, model, &config, tensors)?;
            Ok((config, parts))
        };
        parse().map_err(|error| at(dir, error))
    };
    read().map_err(|error| formats::explained(dir, error))
}
