//! The header of a safetensors file: names, types, shapes and places of its tensors.

use std::path::Path;

use safetensors::tensor::{Dtype, Metadata, SafeTensorError, SafeTensors};
use serde_json::{Map, Value, json};

use crate::adapter::{damage, float_type};
pub(super) use crate::adapter::{dimensions, stored_type};
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
        float_type(self.dtype)
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

/// The longest header that the safetensors format allows.
pub(super) const LONGEST_HEADER: u64 = 100_000_000;

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
    /// Parses the header of a file of `length` bytes, which begins with `raw`: with the header and nothing after it, or with what
    /// there is. Errors: [`Error::File`] for a file that is too short or too long, or whose offsets overlap, leave gaps or do not
    /// fit the shapes.
    pub(super) fn parse(path: &Path, raw: &[u8], length: u64) -> Result<Self> {
        let damaged = |error| Error::File { path: path.into(), reason: damage(path, raw, length, &error) };
        let metadata = match SafeTensors::read_metadata(raw) {
            // The header is sound, and no data follow it in `raw`.
            Err(SafeTensorError::MetadataIncompleteBuffer) | Ok(_) => {
                serde_json::from_slice::<Metadata>(raw.get(size_of::<u64>()..).unwrap_or_default())
                    .map_err(|error| damaged(SafeTensorError::InvalidHeaderDeserialization(error)))?
            }
            Err(error) => return Err(damaged(error)),
        };
        let (data, raw) = (raw.len(), raw.to_vec());
        if (data as u64).checked_add(metadata.data_len() as u64) != Some(length) {
            return Err(damaged(SafeTensorError::MetadataIncompleteBuffer));
        }
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

    /// The bytes of a header for these tensors, stored one after the other; those of the file itself if the tensors are the same.
    /// Metadata and the order of keys are kept; new tensors come last.
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
