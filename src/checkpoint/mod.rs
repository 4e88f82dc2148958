//! Models on disk: safetensors checkpoints, one file or sharded, read through a memory map a piece at a time.
//!
//! ```text
//! mod.rs header.rs map.rs    what a checkpoint holds
//! rewrite.rs output.rs       the same checkpoint with some tensors changed, whole or not at all
//! change.rs merge.rs weight.rs  what an adapter does to which tensor, and how
//! residue.rs                 what takes it back to the bit
//! convert.rs                 another element type
//! extract.rs                 an adapter out of two checkpoints
//! ```
//!
//! Memory stays near one piece of a tensor, whatever the size of the model. Every verb takes a `watch`, which is told how many
//! more bytes are done and may break off: then nothing was written.
//!
//! The weights of a layer, read onto a device:
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
mod convert;
#[cfg(feature = "svd")]
mod extract;
mod header;
mod map;
mod merge;
mod number;
mod output;
mod residue;
mod rewrite;
mod weight;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

pub use convert::convert;
#[cfg(feature = "svd")]
pub use extract::{Extract, extract};
pub use header::Entry;
use memmap2::Mmap;
pub use merge::{Merge, merge, unmerge};
pub use safetensors::tensor::Dtype;

use crate::adapter::formats::{self, Kind};
use crate::adapter::{HostTensor, TENSORS_FILE};
use crate::error::{Error, Result};
use crate::file::{self, failed};
use header::Header;

/// Told how many more bytes of the checkpoint are done. [`ControlFlow::Break`] ends the work with [`Error::Interrupted`].
pub type Watch<'a> = &'a mut dyn FnMut(u64) -> ControlFlow<()>;

/// What the index of a sharded checkpoint is called.
const INDEX: &str = ".safetensors.index.json";

/// A checkpoint whose header is read and whose tensors are not.
///
/// Its files must not be changed while they are read.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    folder: Option<PathBuf>,
    index: Option<PathBuf>,
    shards: Vec<Shard>,
    /// The shard and the entry of a tensor.
    places: BTreeMap<String, (usize, usize)>,
}

/// One file of a checkpoint.
#[derive(Debug)]
pub(crate) struct Shard {
    path: PathBuf,
    file: File,
    header: Header,
}

impl Checkpoint {
    /// Opens a `.safetensors` file, the index of a sharded checkpoint, or a folder that holds one of the two.
    ///
    /// Errors: [`Error::File`] for what is missing or damaged, an index that does not agree with its shards, and a folder with
    /// none or several of them.
    pub fn open(path: &Path) -> Result<Self> {
        Self::read(path).map_err(|error| match formats::recognise(path) {
            Ok(thing) if path.is_dir() && !thing.kind.is_safetensors() => thing.refused(),
            _ => error,
        })
    }

    fn read(path: &Path) -> Result<Self> {
        let main = if path.is_dir() { main_file(path)? } else { path.into() };
        let indexed = main.extension().is_some_and(|extension| extension == "json");
        let names = if indexed { read_index(&main)? } else { BTreeMap::new() };
        let files: BTreeSet<&String> = names.values().collect();
        let beside = |name: &String| Shard::open(&main.with_file_name(name));
        let shards = if indexed { files.into_iter().map(beside).collect::<Result<_>>()? } else { vec![Shard::open(&main)?] };
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
        Ok(Self { path: path.into(), folder, index: indexed.then_some(main), shards, places })
    }

    /// Where it lies, as it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How many files it has.
    pub fn files(&self) -> usize {
        self.shards.len()
    }

    /// All tensors, file by file, in the order in which they are stored.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.shards.iter().flat_map(|shard| &shard.header.entries)
    }

    /// The bytes of all tensors.
    pub fn bytes(&self) -> u64 {
        self.entries().map(|entry| entry.bytes as u64).sum()
    }

    /// A tensor by name, read whole: its shape, how it is stored, and its numbers as `f32`, which holds every `f16` and `bf16`.
    ///
    /// A weight is `n×k`, as a [`Linear`](crate::nn::Linear) has it; see [`HostTensor::to_device`]. Errors: [`Error::File`] for a
    /// name that the checkpoint does not have, and for a tensor of another element type than these three.
    pub fn tensor(&self, name: &str) -> Result<HostTensor> {
        let found = self.find(name).ok_or_else(|| refused(&self.path, format!("has no tensor `{name}`")))?;
        let (shard, entry) = found;
        let other = || shard.refused(format!("`{name}` holds {:?}, want F32, F16 or BF16", entry.dtype));
        let dtype = entry.float().ok_or_else(other)?;
        let mut values = vec![0.0; entry.elements()];
        number::widen(dtype, &shard.read(entry, 0, entry.bytes)?, &mut values);
        Ok(HostTensor { shape: entry.shape.clone(), dtype, values })
    }

    /// What its tensors are: a model, an adapter, a quantised model.
    pub fn kind(&self) -> Kind {
        let outline = |entry: &Entry| formats::Outline {
            name: entry.name.clone(),
            shape: entry.shape.clone(),
            dtype: format!("{:?}", entry.dtype),
        };
        formats::by_tensors(&self.entries().map(outline).collect::<Vec<_>>())
    }

    /// Errors: [`Error::File`] for tensors that are no model in `f32`, `f16` or `bf16`, saying what they are and what to do.
    pub(crate) fn is_plain_model(&self) -> Result<()> {
        match self.kind() {
            Kind::Checkpoint => Ok(()),
            Kind::Peft => Err(refused(&self.path, "is an adapter, where a model is wanted".into())),
            kind => Err(formats::Thing { kind, path: self.path.clone() }.refused()),
        }
    }

    /// A tensor by name, and the file it lies in.
    pub(crate) fn find(&self, name: &str) -> Option<(&Shard, &Entry)> {
        let &(shard, entry) = self.places.get(name)?;
        Some((&self.shards[shard], &self.shards[shard].header.entries[entry]))
    }
}

impl Shard {
    fn open(path: &Path) -> Result<Self> {
        let opened = File::open(path).and_then(|file| Ok((file.metadata()?.len(), file)));
        let (length, file) = opened.map_err(|error| failed(path, &error))?;
        let length = usize::try_from(length).map_err(|_| refused(path, "is too large for this machine".into()))?;
        let whole = map::map(&file, 0, length).map_err(|error| failed(path, &error))?;
        let header = Header::parse(path, &whole)?;
        Ok(Self { path: path.into(), file, header })
    }

    /// A piece of a tensor. Errors: [`Error::File`].
    pub(crate) fn read(&self, entry: &Entry, start: usize, bytes: usize) -> Result<Mmap> {
        map::map_to_read(&self.file, entry.start + start as u64, bytes).map_err(|error| failed(&self.path, &error))
    }

    fn refused(&self, reason: String) -> Error {
        refused(&self.path, reason)
    }
}

/// The index in a folder, or its only safetensors file.
fn main_file(folder: &Path) -> Result<PathBuf> {
    let listed = std::fs::read_dir(folder).and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect());
    let mut paths: Vec<PathBuf> = listed.map_err(|error| failed(folder, &error))?;
    paths.sort();
    // An adapter beside its model is no other model.
    let of_adapter = |path: &Path| path.file_name().is_some_and(|name| name == TENSORS_FILE);
    let other = |path: &PathBuf| path.extension().is_some_and(|end| end == "safetensors") && !of_adapter(path);
    if paths.iter().any(other) {
        paths.retain(|path| !of_adapter(path));
    }
    let ending = |ending: &str| -> Vec<&PathBuf> {
        paths.iter().filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().ends_with(ending))).collect()
    };
    match (ending(INDEX).as_slice(), ending(".safetensors").as_slice()) {
        ([index], _) => Ok(index.to_path_buf()),
        ([], [file]) => Ok(file.to_path_buf()),
        ([], []) => Err(refused(folder, "holds no .safetensors file".into())),
        (_, _) => Err(refused(folder, format!("holds several checkpoints; name the .safetensors file or the *{INDEX}"))),
    }
}

/// Which file each tensor lies in.
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

/// The names in a message: as many as it can bear.
fn listed(names: &[String]) -> String {
    const SHOWN: usize = 4;
    let shown: Vec<String> = names.iter().take(SHOWN).map(|name| format!("`{name}`")).collect();
    let more = names.len().saturating_sub(SHOWN);
    if more == 0 { shown.join(", ") } else { format!("{} and {more} more", shown.join(", ")) }
}
