//! Saves a run of training to one file, and resumes it: the steps that follow have the bits that they would have had without the
//! interruption.
//!
//! A checkpoint holds every trainable parameter, the state of [`Adam`], the place in the data, the random generator, and what the
//! caller adds. The file is written whole or not at all, and replaces the one before it only when it is complete. It is a
//! safetensors file; its tensors are named `param.LAYER.NAME`, and `adam_m.`, `adam_v.` and `adam_master.` of the same.
//!
//! ```
//! use lowrank::distributed::Sampler;
//! use lowrank::nn::{Adam, Adaptable, LoraConfig, Mlp, Targets};
//! use lowrank::training::{Progress, resume, save};
//! use lowrank::{Cpu, random::Rng};
//!
//! let (cpu, mut rng) = (Cpu::<f32>::new()?, Rng::new(0));
//! let mut model = Mlp::new(&cpu, &[4, 3], &mut rng)?;
//! model.add_adapters(&cpu, Targets::All, &LoraConfig::new(2, 4.0), &mut rng)?;
//! let (mut adam, mut sampler) = (Adam::new(1e-3)?, Sampler::new(100, 8, 0)?);
//! // … 50 steps
//! let folder = std::env::temp_dir().join(format!("lowrank-checkpoint-{}", std::process::id()));
//! std::fs::create_dir_all(&folder).unwrap();
//! let path = folder.join("training.safetensors");
//! let settings = "rank 2, batch 8".to_string(); // whatever a resumed run must have in common with this one
//! let progress = Progress { step: 50, position: sampler.position(), rng, settings: settings.clone(), extra: String::new() };
//! save(&path, &cpu, &mut model, &adam, &progress)?;
//!
//! // In another process, with the same model and an adapter of the same shape:
//! let Progress { step, position, rng, .. } = resume(&path, &cpu, &mut model, &mut adam, &settings)?;
//! sampler.seek(position)?;
//! assert_eq!((step, rng.seed()), (50, 0));
//! # std::fs::remove_dir_all(folder).unwrap();
//! # Ok::<(), lowrank::Error>(())
//! ```
//!
//! With several processes all ranks have the same state: rank 0 saves, and all read the file of rank 0 with
//! [`broadcast_file`](crate::distributed::broadcast_file) and [`resume_from_bytes`].

mod metadata;
mod reader;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::path::Path;

use safetensors::tensor::{Dtype, TensorView, serialize};

use crate::adapter::stored_type;
use crate::autograd::Param;
use crate::backend::Backend;
use crate::distributed::{Fingerprint, SamplerPosition};
use crate::element::{DType, Element, Float};
use crate::error::{Error, Result};
use crate::file;
use crate::nn::{Adam, AdamState, Adaptable, check_unmerged, distinct};
use crate::random::Rng;
use crate::tensor::{Shape, Tensor};
use metadata::Metadata;
use reader::Reader;

/// How far a run has come.
#[derive(Clone, Debug)]
pub struct Progress {
    /// The number of steps made.
    pub step: u64,
    /// The place of the next batch.
    pub position: SamplerPosition,
    /// The random generator of the run.
    pub rng: Rng,
    /// The settings of the run, in words of the caller. [`resume`] refuses a file of a run with others.
    pub settings: String,
    /// Anything else that the caller wants back, such as the losses so far.
    pub extra: String,
}

/// Writes a checkpoint. An earlier file of this name is replaced when the new one is complete.
///
/// It holds the parameters that are trainable, those of [`Adaptable::other_params_mut`] too. The frozen base is not in it.
///
/// Errors: [`Error::Io`] if the file cannot be written, [`Error::Value`] while an adapter is merged; those of the device. An
/// earlier file is unchanged then.
pub fn save<B: Backend>(
    path: &Path,
    backend: &B,
    model: &mut impl Adaptable<B>,
    adam: &Adam<B>,
    progress: &Progress,
) -> Result<()> {
    file::write_whole(path, &to_bytes(path, backend, model, adam, progress)?)
}

/// Restores the parameters and the optimizer of a run from a file of [`save`], into a model with the same layers and adapters.
///
/// `adam` gets the settings of the saved one, such as its learning rate.
///
/// Errors: [`Error::Io`]; [`Error::File`] for a file that is damaged or no checkpoint, of a run with other `settings`, or with
/// parameters that this model does not have or train, and for those that the file lacks; [`Error::Value`] while an adapter is
/// merged. Nothing is changed then.
pub fn resume<B: Backend>(
    path: &Path,
    backend: &B,
    model: &mut impl Adaptable<B>,
    adam: &mut Adam<B>,
    settings: &str,
) -> Result<Progress> {
    resume_from_bytes(&file::read(path)?, path, backend, model, adam, settings)
}

/// [`resume`] from the content of a file; `path` is what errors name.
///
/// Errors: those of [`resume`], without [`Error::Io`].
pub fn resume_from_bytes<B: Backend>(
    bytes: &[u8],
    path: &Path,
    backend: &B,
    model: &mut impl Adaptable<B>,
    adam: &mut Adam<B>,
    settings: &str,
) -> Result<Progress> {
    check_unmerged(model, "resume")?;
    let reader = Reader::new(path, bytes)?;
    let metadata = &reader.metadata;
    if metadata.settings != settings {
        let reason = format!("is of a run with other settings: `{}`, and this run has `{settings}`", metadata.settings);
        return Err(bad(path, reason));
    }
    let mut restored = metadata.adam.restore().map_err(|error| bad(path, error.to_string()))?;
    let (mut tensors, mut states, mut names) = (VecDeque::new(), HashMap::new(), BTreeSet::new());
    for_each_trainable(model, |name, param| {
        let shape = param.tensor().shape();
        tensors.push_back(reader.tensor::<B, B::Elem>(backend, &format!("param.{name}"), shape)?);
        if let Some(&t) = metadata.adam.param_steps.get(&name) {
            let moment = |kind| reader.tensor::<B, f32>(backend, &format!("{kind}.{name}"), shape);
            let master = (B::Elem::DTYPE != DType::F32).then(|| moment("adam_master")).transpose()?;
            states.insert(param.id(), AdamState { t, m: moment("adam_m")?, v: moment("adam_v")?, master });
        }
        names.insert(name);
        Ok(())
    })?;
    reader.check_all_known(&names)?;
    for_each_trainable(model, |_, param| tensors.pop_front().map_or(Ok(()), |tensor| param.set_tensor(tensor)))?;
    restored.restore(metadata.adam.steps, states);
    *adam = restored;
    Ok(metadata.progress())
}

/// The content of a file.
fn to_bytes<B: Backend>(
    path: &Path,
    backend: &B,
    model: &mut impl Adaptable<B>,
    adam: &Adam<B>,
    progress: &Progress,
) -> Result<Vec<u8>> {
    check_unmerged(model, "save")?;
    distinct(model, "save")?;
    let (mut tensors, mut metadata) = (Vec::new(), Metadata::new(progress, adam));
    for_each_trainable(model, |name, param| {
        tensors.push(stored(backend, format!("param.{name}"), B::Elem::DTYPE, param.tensor())?);
        let Some(AdamState { t, m, v, master }) = adam.state(param) else { return Ok(()) };
        for (kind, tensor) in [("adam_m", Some(m)), ("adam_v", Some(v)), ("adam_master", master.as_ref())] {
            let Some(tensor) = tensor else { continue };
            tensors.push(stored(backend, format!("{kind}.{name}"), DType::F32, tensor)?);
        }
        metadata.adam.param_steps.insert(name, *t);
        Ok(())
    })?;
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        let view = TensorView::new(*dtype, vec![shape.rows, shape.cols], bytes);
        view.map(|view| (name.as_str(), view)).map_err(|error| bad(path, error.to_string()))
    });
    let views = views.collect::<Result<Vec<_>>>()?;
    let tensors_are = fingerprint(views.iter().map(|(name, view)| (*name, view.data())));
    serialize(views, Some(metadata.to_map(tensors_are))).map_err(|error| bad(path, error.to_string()))
}

/// A tensor as safetensors stores it: name, type, shape and bytes.
type Stored = (String, Dtype, Shape, Vec<u8>);

fn stored<B: Backend, T: Element>(backend: &B, name: String, dtype: DType, tensor: &Tensor<B, T>) -> Result<Stored> {
    let host = tensor.to_vec(backend)?;
    Ok((name, stored_type(dtype), tensor.shape(), bytemuck::cast_slice(&host).to_vec()))
}

/// Calls `visit` with the name and the trainable parameter, in an order that depends on the model alone.
fn for_each_trainable<B: Backend>(
    model: &mut impl Adaptable<B>,
    mut visit: impl FnMut(String, &mut Param<B>) -> Result<()>,
) -> Result<()> {
    for (layer, there) in model.layers_mut() {
        for (name, param) in there.named_params_mut().filter(|(_, param)| param.trainable) {
            visit(format!("{layer}.{name}"), param)?;
        }
    }
    let others = model.other_params_mut().enumerate().filter(|(_, param)| param.trainable);
    others.into_iter().try_for_each(|(at, param)| visit(format!("other.{at}"), param))
}

/// A number that changes if a name or a bit of a tensor does; the order of the tensors does not matter.
fn fingerprint<'f>(tensors: impl Iterator<Item = (&'f str, &'f [u8])>) -> u64 {
    let one = |(name, data): (&str, &[u8])| {
        let mut fingerprint = Fingerprint::default();
        fingerprint.bytes(name.as_bytes());
        fingerprint.bytes(data);
        fingerprint.value()
    };
    tensors.map(one).fold(0, u64::wrapping_add)
}

fn bad(path: &Path, reason: impl Into<String>) -> Error {
    Error::File { path: path.into(), reason: reason.into() }
}
