//! The header of a safetensors file: names, types, shapes and places of its tensors.

use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};

use crate::adapter::damage;
use crate::element::DType;
use crate::error::{Error, Result};

/// A tensor of a file, without its data.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Its name, such as `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// The element type in the spelling of safetensors: `F32`, `BF16`, `I64`, …
    pub dtype: Dtype,
    /// The length of each dimension.
    pub shape: Vec<usize>,
    /// The offset of its first byte from the beginning of the file.
    pub start: u64,
    /// Its size in bytes.
    pub bytes: usize,
}

impl Entry {
    /// The element type, if it is `f32`, `f16` or `bf16`.
    pub fn float(&self) -> Option<DType> {
        match self.dtype {
            Dtype::F32 => Some(DType::F32),
            Dtype::F16 => Some(DType::F16),
            Dtype::BF16 => Some(DType::BF16),
            _ => None,
        }
    }

    /// The shape as text, such as `4096×11008`.
    pub fn dimensions(&self) -> String {
        dimensions(&self.shape)
    }

    /// An entry for a tensor that is to be written.
    pub(super) fn new(name: &str, dtype: Dtype, shape: Vec<usize>) -> Self {
        let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
        Self { name: name.into(), dtype, shape, start: 0, bytes }
    }

    /// The entry of this tensor converted to another type.
    pub(super) fn with_dtype(&self, dtype: Dtype) -> Self {
        if dtype == self.dtype { self.clone() } else { Self::new(&self.name, dtype, self.shape.clone()) }
    }

    /// The number of its elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product() // cannot overflow: the file was checked to be long enough
    }
}

/// The header of a file.
#[derive(Clone, Debug)]
pub(super) struct Header {
    /// The bytes of the file: the length in eight bytes, then JSON.
    raw: Vec<u8>,
    /// The tensors, in the order of their data, which fills the rest of the file.
    pub(super) entries: Vec<Entry>,
    /// True if the file holds tensors that are not in `entries`.
    filtered: bool,
}

impl Header {
    /// Parses the header at the beginning of `file`, which is the complete file; its other bytes are not read. Errors: [`Error::File`] for
    /// a file that is too short or too long, or whose offsets overlap, leave gaps or do not fit the shapes.
    pub(super) fn parse(path: &Path, file: &[u8]) -> Result<Self> {
        let refused = |reason: String| Error::File { path: path.into(), reason };
        let (length, metadata) = SafeTensors::read_metadata(file).map_err(|error| refused(damage(path, file, &error)))?;
        let data = length + size_of::<u64>();
        let raw = file.get(..data).ok_or_else(|| refused("ends within its header".into()))?.to_vec();
        let mut entries = Vec::new();
        for name in metadata.offset_keys() {
            let Some(info) = metadata.info(&name) else { continue };
            let (start, end) = info.data_offsets;
            let shape = info.shape.clone();
            entries.push(Entry { name, dtype: info.dtype, shape, start: (data + start) as u64, bytes: end - start });
        }
        Ok(Self { raw, entries, filtered: false })
    }

    /// The object `__metadata__`; empty if there is none.
    pub(super) fn metadata(&self, path: &Path) -> Result<Map<String, Value>> {
        let mut document = self.document(path)?;
        Ok(document.remove("__metadata__").and_then(|value| value.as_object().cloned()).unwrap_or_default())
    }

    fn document(&self, path: &Path) -> Result<Map<String, Value>> {
        let text = self.raw.get(size_of::<u64>()..).unwrap_or_default();
        serde_json::from_slice(text).map_err(|error| Error::File { path: path.into(), reason: error.to_string() })
    }

    /// The bytes of a header for these tensors, stored one after the other; those of the file itself if the tensors are the same. Metadata
    /// and the order of keys are kept; new tensors come last.
    pub(super) fn with_entries(&self, path: &Path, entries: &[Entry]) -> Result<Vec<u8>> {
        let same =
            |(one, other): (&Entry, &Entry)| (&one.name, one.dtype, &one.shape) == (&other.name, other.dtype, &other.shape);
        if !self.filtered && self.entries.len() == entries.len() && self.entries.iter().zip(entries).all(same) {
            return Ok(self.raw.clone());
        }
        let refused = |error: serde_json::Error| Error::File { path: path.into(), reason: error.to_string() };
        let mut document = self.document(path)?;
        document.retain(|name, _| name == "__metadata__" || entries.iter().any(|entry| entry.name == *name));
        let mut offset = 0;
        for Entry { name, dtype, shape, bytes, .. } in entries {
            let end = offset + bytes;
            document.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}));
            offset = end;
        }
        let mut text = serde_json::to_vec(&document).map_err(refused)?;
        text.resize(text.len().next_multiple_of(8), b' ');
        Ok([&(text.len() as u64).to_le_bytes(), text.as_slice()].concat())
    }

    /// Removes the entries for which `keep` is false.
    pub(super) fn retain(&mut self, keep: impl Fn(&Entry) -> bool) {
        let before = self.entries.len();
        self.entries.retain(keep);
        self.filtered |= self.entries.len() != before;
    }
}

/// A shape as text, such as `4096×11008`.
pub(super) fn dimensions(shape: &[usize]) -> String {
    shape.iter().map(usize::to_string).collect::<Vec<_>>().join("×")
}

/// An element type in the spelling of safetensors.
pub(super) fn spelled(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
    }
}
