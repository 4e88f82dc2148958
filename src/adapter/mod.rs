//! Adapter folders as PEFT writes them: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! ```
//! use lowrank::nn::{LoraConfig, Mlp, Targets};
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

mod combine;
#[cfg(feature = "svd")]
mod compress;
mod config;
#[cfg(feature = "svd")]
mod decompose;
mod folder;
mod matrix;
mod mix;
mod tensors;

use std::path::Path;

pub use combine::{CombinationType, Combine, MajoritySign, combine};
#[cfg(feature = "svd")]
pub use compress::{compress, extract};
pub use config::AdapterConfig;
#[cfg(feature = "svd")]
pub use decompose::{Keep, Svd, olora, pissa};
pub use folder::{Factors, Folder};
pub use matrix::HostMatrix;
pub use tensors::{HostTensor, HostTensors, parse_tensors};

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::file::{self, Staged};
use crate::nn::{Adapter, Mlp};
use crate::tensor::{Shape, Tensor};

/// The settings of an adapter, in its folder.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The numbers of an adapter, in its folder.
pub const TENSORS_FILE: &str = "adapter_model.safetensors";

/// Writes the adapters of a model as PEFT 0.21 would, both files whole or not at all; makes the folder if it is not there.
///
/// PEFT has no raw alpha: it is written as the `lora_alpha` that comes to the same scaling. Errors: [`Error::Value`] for a
/// model without adapters, or whose adapters differ in dropout; [`Error::File`].
pub fn save<B: Backend>(backend: &B, model: &Mlp<B>, dir: &Path) -> Result<()> {
    write(backend, model, &AdapterConfig::of(model)?, dir)
}

/// [`save`], with the keys of a config that came from elsewhere. What says something else than the model is set anew.
pub fn save_with<B: Backend>(backend: &B, model: &Mlp<B>, config: &AdapterConfig, dir: &Path) -> Result<()> {
    write(backend, model, &config.updated(model)?, dir)
}

fn write<B: Backend>(backend: &B, model: &Mlp<B>, config: &AdapterConfig, dir: &Path) -> Result<()> {
    let mut named = Vec::new();
    for (name, layer) in model.layers() {
        if let Some(lora) = layer.lora() {
            named.push((tensors::key(name, "lora_A"), &lora.adapter().a().tensor));
            named.push((tensors::key(name, "lora_B"), &lora.adapter().b().tensor));
        }
    }
    let bytes = tensors::serialize(backend, named).map_err(|error| at(dir, error))?;
    let created = std::fs::create_dir_all(dir);
    created.map_err(|error| Error::File { path: dir.into(), reason: error.to_string() })?;
    let staged =
        [Staged::new(&dir.join(TENSORS_FILE), &bytes)?, Staged::new(&dir.join(CONFIG_FILE), config.to_json().as_bytes())?];
    staged.into_iter().try_for_each(Staged::publish)
}

/// Freezes a model and gives it the adapters of a folder, in place of those it has. The config is for [`save_with`].
///
/// The numbers are rounded to the model's element type. Errors: [`Error::File`] for a file that is missing, damaged or does
/// not fit the model; [`Error::Unsupported`] for a setting that this crate does not know how to honour; [`Error::Value`] for
/// a setting outside its range, or a model that holds a merged adapter. The model is not changed then.
pub fn load<B: Backend>(backend: &B, model: &mut Mlp<B>, dir: &Path) -> Result<AdapterConfig> {
    let (config, tensors) = (file::read(&dir.join(CONFIG_FILE))?, file::read(&dir.join(TENSORS_FILE))?);
    let config = AdapterConfig::from_json(&config).map_err(|error| at(dir, error))?;
    let tensors = parse_tensors(&tensors).map_err(|error| at(dir, error))?;
    let adapters = adapters_for(backend, model, &config, tensors).map_err(|error| at(dir, error))?;
    model.unload()?;
    model.set_adapters(adapters)?; // cannot fail: each is for a layer there is, and fits it
    Ok(config)
}

/// The adapters that the files describe: every tensor that a target needs, and no other.
fn adapters_for<B: Backend>(
    backend: &B,
    model: &Mlp<B>,
    config: &AdapterConfig,
    mut tensors: HostTensors,
) -> Result<Vec<(String, Adapter<B>)>> {
    let mut adapters = Vec::new();
    for (name, layer) in model.layers() {
        let Some(config) = config.lora_config(name) else { continue };
        config.check()?;
        let Shape { rows: n, cols: k } = layer.base().weight().tensor.shape();
        let a = take(backend, &mut tensors, &tensors::key(name, "lora_A"), (config.rank, k).into())?;
        let b = take(backend, &mut tensors, &tensors::key(name, "lora_B"), (n, config.rank).into())?;
        adapters.push((name.to_string(), Adapter::from_tensors(a, b, config)?));
    }
    if adapters.is_empty() {
        let layers: Vec<&str> = model.layers().map(|(name, _)| name).collect();
        return Err(config::refused(format!("`target_modules` names none of the layers {}", layers.join(", "))));
    }
    match tensors.keys().next() {
        Some(name) => Err(tensors::refused(format!("`{name}` is not part of an adapter that {CONFIG_FILE} describes"))),
        None => Ok(adapters),
    }
}

/// A tensor of the file on the device, if it is there, has this shape, and no number overflows.
fn take<B: Backend>(backend: &B, tensors: &mut HostTensors, name: &str, want: Shape) -> Result<Tensor<B>> {
    let tensor = tensors.remove(name).ok_or_else(|| tensors::refused(format!("`{name}` is missing, want {want}")))?;
    if tensor.shape != [want.rows, want.cols] {
        let got: Vec<String> = tensor.shape.iter().map(usize::to_string).collect();
        return Err(tensors::refused(format!("`{name}` is {}, want {want}", got.join("×"))));
    }
    Tensor::from_slice(backend, want, &tensors::narrow(name, &tensor.values)?)
}

/// The same error, with the file it speaks of in this folder.
fn at(dir: &Path, error: Error) -> Error {
    match error {
        Error::File { path, reason } => Error::File { path: dir.join(path), reason },
        Error::Unsupported { path, field, value } => Error::Unsupported { path: dir.join(path), field, value },
        other => other,
    }
}
