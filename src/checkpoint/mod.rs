//! Models on disk: safetensors checkpoints, in one file or sharded, read one piece at a time.
//!
//! ```text
//! mod.rs which.rs header.rs shard.rs model.rs    opening a file or folder, and reading its config
//! rewrite.rs output.rs companions.rs             writing a checkpoint with some tensors changed, completely or not at all
//! plan.rs names.rs ties.rs layout.rs experts.rs  finding the tensors that an adapter changes
//! change.rs weight.rs merge.rs                   merging into them, and unmerging
//! residue.rs                                     the file that makes unmerging exact
//! convert.rs                                     converting to another element type
//! quantised.rs quantise.rs                       weights of 4 and 8 bits, as bitsandbytes stores them
//! extract.rs                                     extracting an adapter from two checkpoints
//! ```
//!
//! Only one piece of a tensor is in memory at a time, whatever the size of the model. Every function takes a `watch`, which is
//! called with the number of bytes that have been processed since the last call, and can interrupt the work; nothing is written
//! then.
//!
//! To read the weights of a layer onto a device:
//!
//! ```
//! use lowrank::{Cpu, checkpoint::Checkpoint, nn::Linear};
//! # use safetensors::tensor::{Dtype, TensorView, serialize};
//! # let (temporary, zeros) = (tempfile::tempdir().unwrap(), [0; 48]);
//! # let path = &temporary.path().join("model.safetensors");
//! # let weight = TensorView::new(Dtype::F32, vec![4, 3], &zeros).unwrap();
//! # let bias = TensorView::new(Dtype::F32, vec![4], &zeros[..16]).unwrap();
//! # std::fs::write(path, serialize([("fc1.weight", weight), ("fc1.bias", bias)], None).unwrap()).unwrap();
//!
//! let (cpu, model) = (Cpu::<f32>::new()?, Checkpoint::open(path)?);
//! let weight = model.tensor("fc1.weight")?.to_device(&cpu)?; // n×k
//! let bias = model.tensor("fc1.bias")?.to_device(&cpu)?; // 1×n
//! let fc1 = Linear::from_tensors(weight, Some(bias))?;
//! # assert_eq!(fc1.weight().tensor().shape(), (4, 3).into());
//! # Ok::<(), lowrank::Error>(())
//! ```

mod change;
mod companions;
mod convert;
mod experts;
#[cfg(feature = "svd")]
mod extract;
mod header;
mod layout;
mod merge;
mod model;
mod names;
mod output;
mod plan;
mod quantise;
mod quantised;
mod residue;
mod rewrite;
mod shard;
mod ties;
mod weight;
mod which;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

pub use convert::convert;
#[cfg(feature = "svd")]
pub use extract::{Extract, Extracted, extract};
pub use header::Entry;
pub use layout::Layout;
pub use merge::{Merge, Unmerge, merge, unmerge};
pub use quantise::{Quantise, dequantise, quantise};
pub use safetensors::tensor::Dtype;

use crate::adapter::HostTensor;
use crate::adapter::formats::{self, Kind};
use crate::element::DType;
use crate::error::{Error, Result};
use crate::file;
use shard::Shard;
use which::main_file;

/// Called with the number of bytes of the checkpoint that have been processed since the last call. [`ControlFlow::Break`] ends
/// the work with [`Error::Interrupted`].
pub type Watch<'a> = &'a mut dyn FnMut(u64) -> ControlFlow<()>;

/// The end of the file name of a sharded checkpoint's index.
const INDEX: &str = ".safetensors.index.json";

/// An open checkpoint: its headers are in memory, its tensors are not.
///
/// The files must not be changed while it is open: what reads them then returns an error.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    folder: Option<PathBuf>,
    index: Option<PathBuf>,
    shards: Vec<Shard>,
    /// The indices of a tensor's shard and of its entry there, by name.
    places: BTreeMap<String, (usize, usize)>,
    note: Option<String>,
}

impl Checkpoint {
    /// Opens a `.safetensors` file, the index of a sharded checkpoint, or a folder that holds one of the two.
    ///
    /// In a folder, `model.safetensors` or its index is preferred, and the file of an adapter is opened only if there is no
    /// other.
    ///
    /// Errors: [`Error::File`] for a file that is missing or damaged, an index that disagrees with its shards, and a folder with
    /// no checkpoint or several.
    pub fn open(path: &Path) -> Result<Self> {
        Self::read(path).map_err(|error| match formats::recognise(path) {
            Ok(found) if path.is_dir() && !found.kind.is_safetensors() => found.refusal(),
            _ => error,
        })
    }

    fn read(path: &Path) -> Result<Self> {
        let (main, note) = if path.is_dir() { main_file(path)? } else { (path.into(), None) };
        let indexed = main.extension().is_some_and(|extension| extension == "json");
        let names = if indexed { read_index(&main)? } else { BTreeMap::new() };
        let files: BTreeSet<&String> = names.values().collect();
        // If a tensor is in two shards, the one that the index names is used.
        let open_shard = |file: &String| {
            let mut shard = Shard::open(&main.with_file_name(file))?;
            shard.header.retain(|entry| names.get(&entry.name).is_none_or(|named| named == file));
            Ok(shard)
        };
        let shards = if indexed { files.into_iter().map(open_shard).collect::<Result<_>>()? } else { vec![Shard::open(&main)?] };
        let mut places = BTreeMap::new();
        for (at, shard) in shards.iter().enumerate() {
            for (entry, info) in shard.header.entries.iter().enumerate() {
                if places.insert(info.name.clone(), (at, entry)).is_some() {
                    return Err(shard.refused(format!("`{}` is in another shard as well", info.name)));
                }
            }
        }
        for (name, file) in &names {
            let there =
                places.get(name).and_then(|&(at, _)| shards[at].path.file_name()).is_some_and(|found| found == file.as_str());
            if !there {
                return Err(refused(&main, format!("`{name}` is not in {file}")));
            }
        }
        let folder = (indexed || path.is_dir()).then(|| main.parent().map_or_else(PathBuf::new, Path::to_path_buf));
        Ok(Self { path: path.into(), folder, index: indexed.then_some(main), shards, places, note })
    }

    /// The path that was given to [`open`](Self::open).
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A note about the choice of the file in a folder, if there was a doubt.
    pub fn note(&self) -> Option<&str> {
        self.note.as_deref()
    }

    /// True if a file is one of its shards.
    pub(crate) fn holds(&self, path: &Path) -> bool {
        self.shards.iter().any(|shard| shard.path.file_name() == path.file_name())
    }

    /// The folder that contains its files.
    pub(crate) fn parent(&self) -> Option<&Path> {
        let folder = self.shards.first()?.path.parent()?;
        Some(if folder.as_os_str().is_empty() { Path::new(".") } else { folder })
    }

    /// True if it is to be written as a folder.
    pub(crate) fn is_folder(&self) -> bool {
        self.folder.is_some()
    }

    /// The number of its files.
    pub fn files(&self) -> usize {
        self.shards.len()
    }

    /// The entries of all tensors, file by file, in the order in which they are stored.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.shards.iter().flat_map(|shard| &shard.header.entries)
    }

    /// The total size of all tensors in bytes.
    pub fn bytes(&self) -> u64 {
        self.entries().map(|entry| entry.bytes as u64).sum()
    }

    /// Reads a tensor, widened to `f32`, which is exact for `f16` and `bf16`.
    ///
    /// A weight is `n×k`, as in a [`Linear`](crate::nn::Linear); see [`HostTensor::to_device`]. Errors: [`Error::File`] for a
    /// name that the checkpoint does not have, and for a tensor of another element type than `f32`, `f16` and `bf16`.
    pub fn tensor(&self, name: &str) -> Result<HostTensor> {
        let found = self.find(name).ok_or_else(|| refused(&self.path, format!("has no tensor `{name}`")))?;
        let (shard, entry) = found;
        let values = shard.widened(entry)?;
        Ok(HostTensor { shape: entry.shape.clone(), dtype: entry.float().unwrap_or(DType::F32), values })
    }

    /// The kind of its tensors, such as a model, an adapter or a quantised model.
    pub fn kind(&self) -> Kind {
        let outline = |entry: &Entry| formats::TensorInfo {
            name: entry.name.clone(),
            shape: entry.shape.clone(),
            dtype: format!("{:?}", entry.dtype),
        };
        formats::by_tensors(&self.entries().map(outline).collect::<Vec<_>>())
    }

    /// Errors: [`Error::File`] unless it is a model in `f32`, `f16` or `bf16`; the error says what it is and what to do.
    pub(crate) fn check_plain_model(&self) -> Result<()> {
        match self.kind() {
            Kind::Checkpoint => Ok(()),
            Kind::Peft => Err(refused(&self.path, "is an adapter, where a model is needed".into())),
            kind => Err(formats::Recognised { kind, path: self.path.clone() }.refusal()),
        }
    }

    /// The entry of a tensor, and its file.
    pub(crate) fn find(&self, name: &str) -> Option<(&Shard, &Entry)> {
        let &(shard, entry) = self.places.get(name)?;
        Some((&self.shards[shard], &self.shards[shard].header.entries[entry]))
    }
}

/// The file of each tensor.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    let bytes = file::read(path)?;
    let parsed = serde_json::from_slice(&bytes);
    let document: serde_json::Value = parsed.map_err(|error| refused(path, formats::json_damage(path, &bytes, &error)))?;
    let map = document.get("weight_map").and_then(serde_json::Value::as_object);
    let map = map.ok_or_else(|| refused(path, "`weight_map` is missing, want an object".into()))?;
    let plain = |name: &str| Path::new(name).file_name().is_some_and(|only| only == name);
    let entry = |(tensor, file): (&String, &serde_json::Value)| match file.as_str().filter(|file| plain(file)) {
        Some(file) => Ok((tensor.clone(), file.to_string())),
        None => Err(refused(path, format!("`{tensor}` is in {file}, want the name of a file beside the index"))),
    };
    let names = map.iter().map(entry).collect::<Result<BTreeMap<_, _>>>()?;
    if names.is_empty() { Err(refused(path, "`weight_map` is empty".into())) } else { Ok(names) }
}

fn refused(path: &Path, reason: String) -> Error {
    Error::File { path: path.into(), reason }
}

/// The first few names, for a message, and the number of the others.
fn listed(names: &[String]) -> String {
    const SHOWN: usize = 4;
    let shown: Vec<String> = names.iter().take(SHOWN).map(|name| format!("`{name}`")).collect();
    let more = names.len().saturating_sub(SHOWN);
    if more == 0 { shown.join(", ") } else { format!("{} and {more} more", shown.join(", ")) }
}
