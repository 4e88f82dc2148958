//! The residue of a merge: the elements that `W + ΔW - ΔW` does not restore, because of rounding. With it, unmerging is exact.
//!
//! A residue is a safetensors file. For each merged tensor `x` it holds `x.index` (U32: the positions of these elements),
//! `x.value` (their original values) and, with DoRA, `x.gain` (F32: the factors of its rows or columns). Its metadata holds a
//! digest of each original tensor, with which the restored one is verified.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use safetensors::tensor::Dtype;
use serde_json::{Map, Value, json};

use super::header::Entry;
use super::{Checkpoint, listed, refused};
use crate::error::Result;
use crate::file::{Staged, failed};

const FORMAT: &str = "lowrank-residue";

/// Writes a residue during a merge.
pub(super) struct ResidueWriter {
    path: PathBuf,
    file: File,
    /// Bytes that are reserved for the header, which is written last.
    room: usize,
    header: Map<String, Value>,
    digests: Map<String, Value>,
    written: usize,
    tensor: Option<Tensor>,
}

/// The residue of the current tensor.
struct Tensor {
    entry: Entry,
    index: Vec<u8>,
    value: Vec<u8>,
    gains: Vec<u8>,
    digest: u64,
}

impl ResidueWriter {
    /// Writes a residue of these tensors, each given with its number of gains. `merge` must call [`compare`](Self::compare) for
    /// all of them. The file is staged: complete on the disk, but without its final name.
    pub(super) fn stage(
        path: &Path,
        targets: &[(&Entry, usize)],
        merge: impl FnOnce(&mut ResidueWriter) -> Result<()>,
    ) -> Result<Staged> {
        let large = targets.iter().find(|(entry, _)| u32::try_from(entry.elements()).is_err());
        if let Some((entry, _)) = large {
            return Err(refused(path, format!("`{}` has more elements than a residue can number", entry.name)));
        }
        Staged::with(path, |file| {
            let file = file.try_clone().map_err(|error| failed(path, error))?;
            let (header, digests) = Default::default();
            let mut writer = ResidueWriter { path: path.into(), file, room: 0, header, digests, written: 0, tensor: None };
            const MANY: usize = usize::MAX / 32;
            targets.iter().for_each(|(entry, gains)| {
                writer.add_to_header(entry, [MANY, MANY * usize::from(*gains > 0)], 1 << 60, u64::MAX)
            });
            writer.room = writer.text().len().next_multiple_of(8);
            (writer.header, writer.digests) = Default::default();
            writer.write(&vec![b' '; 8 + writer.room])?;
            writer.written = 0;
            merge(&mut writer)?;
            writer.finish()
        })
    }

    pub(super) fn begin(&mut self, entry: &Entry) {
        self.tensor = Some(Tensor { entry: entry.clone(), index: Vec::new(), value: Vec::new(), gains: Vec::new(), digest: 0 });
    }

    /// Compares the original elements of the tensor, from `first` on, with those that unmerging would give, and keeps those that
    /// differ.
    pub(super) fn compare(&mut self, first: usize, old: &[u8], back: &[u8]) {
        let Some(tensor) = &mut self.tensor else { return };
        tensor.digest = digest(tensor.digest, old);
        let size = tensor.entry.dtype.bitsize() / 8;
        for (at, (old, back)) in old.chunks_exact(size).zip(back.chunks_exact(size)).enumerate() {
            if old != back {
                tensor.index.extend(((first + at) as u32).to_le_bytes()); // `stage` has checked that it fits
                tensor.value.extend(old);
            }
        }
    }

    /// Appends the gains of the next rows of the tensor, or of all of its columns.
    pub(super) fn keep_gains(&mut self, gains: &[f32]) {
        if let Some(tensor) = &mut self.tensor {
            tensor.gains.extend(gains.iter().flat_map(|gain| gain.to_le_bytes()));
        }
    }

    pub(super) fn end(&mut self) -> Result<()> {
        let Some(tensor) = self.tensor.take() else { return Ok(()) };
        self.add_to_header(&tensor.entry, [tensor.index.len() / 4, tensor.gains.len() / 4], self.written, tensor.digest);
        self.write(&tensor.index)?;
        self.write(&tensor.value)?;
        self.write(&tensor.gains)
    }

    /// Adds a tensor with `count` kept elements, stored from byte `start` on, to the header.
    fn add_to_header(&mut self, entry: &Entry, [count, rows]: [usize; 2], start: usize, digest: u64) {
        let (middle, size) = (start + 4 * count, entry.dtype.bitsize() / 8);
        let end = middle + size * count;
        let info = |dtype: Dtype, count: usize, start: usize, end: usize| json!({"dtype": dtype, "shape": [count], "data_offsets": [start, end]});
        self.header.insert(index_of(&entry.name), info(Dtype::U32, count, start, middle));
        self.header.insert(value_of(&entry.name), info(entry.dtype, count, middle, end));
        if rows > 0 {
            self.header.insert(gain_of(&entry.name), info(Dtype::F32, rows, end, end + 4 * rows));
        }
        self.digests.insert(entry.name.clone(), json!(format!("{digest:016x}")));
    }

    fn text(&self) -> Vec<u8> {
        let mut header = self.header.clone();
        let mut metadata = self.digests.clone();
        metadata.insert("format".into(), json!(FORMAT));
        header.insert("__metadata__".into(), Value::Object(metadata));
        Value::Object(header).to_string().into_bytes()
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.written += bytes.len();
        self.file.write_all(bytes).map_err(|error| failed(&self.path, error))
    }

    fn finish(&mut self) -> Result<()> {
        let mut text = self.text();
        text.resize(self.room, b' ');
        self.file.seek(SeekFrom::Start(0)).map_err(|error| failed(&self.path, error))?;
        self.write(&[&(self.room as u64).to_le_bytes(), text.as_slice()].concat())
    }
}

/// Reads a residue during an unmerge.
pub(super) struct ResidueReader {
    file: Checkpoint,
    digests: Map<String, Value>,
}

impl ResidueReader {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = Checkpoint::open(path)?;
        let digests = file.shards.first().map(|shard| shard.header.metadata(path)).transpose()?.unwrap_or_default();
        if digests.get("format").and_then(Value::as_str) != Some(FORMAT) {
            return Err(refused(path, "is not a residue that `merge` wrote".into()));
        }
        Ok(Self { file, digests })
    }

    /// Errors: [`File`](crate::Error::File) unless it is a residue of exactly these tensors.
    pub(super) fn covers<'n>(&self, names: impl Iterator<Item = &'n String>) -> Result<()> {
        let mut digests = self.digests.clone();
        digests.remove("format");
        let missing: Vec<String> = names.filter(|name| digests.remove(name.as_str()).is_none()).cloned().collect();
        let unknown: Vec<String> = digests.keys().cloned().collect();
        for (names, what) in [(missing, "holds nothing of"), (unknown, "was written by a merge that changed")] {
            if !names.is_empty() {
                return Err(refused(self.file.path(), format!("{what} {}: it belongs to another adapter", listed(&names))));
            }
        }
        Ok(())
    }

    /// The residue of one tensor. Errors: [`File`](crate::Error::File) unless it fits the tensor.
    pub(super) fn tensor(&self, entry: &Entry, gains: Option<usize>) -> Result<Restored> {
        let part = |name: String, dtype: Dtype| {
            let found = self.file.find(&name).filter(|(_, part)| part.dtype == dtype);
            let (shard, part) =
                found.ok_or_else(|| refused(self.file.path(), format!("`{name}` is missing, or not {dtype:?}")))?;
            shard.read(part, 0, part.bytes)
        };
        let (index, values) = (part(index_of(&entry.name), Dtype::U32)?, part(value_of(&entry.name), entry.dtype)?);
        let size = entry.dtype.bitsize() / 8;
        let index: Vec<usize> = index.as_chunks().0.iter().map(|&bytes| u32::from_le_bytes(bytes) as usize).collect();
        let ascending = index.is_sorted_by(|one, next| one < next);
        if !ascending || index.len() * size != values.len() || index.last().is_some_and(|&last| last >= entry.elements()) {
            return Err(refused(self.file.path(), format!("the elements of `{}` do not fit the tensor", entry.name)));
        }
        let want = gains.unwrap_or(0);
        let gains: Vec<f32> = match self.file.find(&gain_of(&entry.name)) {
            Some(_) => {
                part(gain_of(&entry.name), Dtype::F32)?.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
            }
            None => Vec::new(),
        };
        if gains.len() != want {
            return Err(refused(
                self.file.path(),
                format!("the gains of the rows or columns of `{}` do not fit the tensor", entry.name),
            ));
        }
        let want = self.digests.get(&entry.name).and_then(Value::as_str).unwrap_or_default().to_string();
        let (path, name) = (self.file.path().to_path_buf(), entry.name.clone());
        Ok(Restored { path, name, size, index, values, gains, next: 0, digest: 0, want })
    }
}

/// The residue of a tensor, applied block by block.
pub(super) struct Restored {
    path: PathBuf,
    name: String,
    size: usize,
    index: Vec<usize>,
    values: Vec<u8>,
    gains: Vec<f32>,
    next: usize,
    digest: u64,
    want: String,
}

impl Restored {
    /// Takes the gains of the rows or columns; empty without DoRA.
    pub(super) fn take_gains(&mut self) -> Vec<f32> {
        std::mem::take(&mut self.gains)
    }

    /// Restores the kept elements within a block that begins at element `first`.
    pub(super) fn patch(&mut self, first: usize, bytes: &mut [u8]) {
        let size = self.size;
        while let Some(at) = self.index.get(self.next).map(|index| (index - first) * size).filter(|at| *at < bytes.len()) {
            bytes[at..at + size].copy_from_slice(&self.values[self.next * size..][..size]);
            self.next += 1;
        }
        self.digest = digest(self.digest, bytes);
    }

    /// Errors: [`File`](crate::Error::File) unless the digest of the restored tensor is that of the original.
    pub(super) fn end(self) -> Result<()> {
        if format!("{:016x}", self.digest) == self.want {
            return Ok(());
        }
        let reason = "would not be restored exactly: the checkpoint, the adapter or the vector unit is not that of the merge";
        Err(refused(&self.path, format!("`{}` {reason}", self.name)))
    }
}

fn index_of(name: &str) -> String {
    format!("{name}.index")
}

fn gain_of(name: &str) -> String {
    format!("{name}.gain")
}

fn value_of(name: &str) -> String {
    format!("{name}.value")
}

/// A non-cryptographic hash.
fn digest(seed: u64, bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<8>();
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    let words = words.iter().chain([&last]).map(|&word| u64::from_le_bytes(word));
    words.fold(seed, |digest, word| (digest ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29))
}
