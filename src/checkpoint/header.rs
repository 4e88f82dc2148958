//! The first bytes of a safetensors file: what tensors it holds, and where.

use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};

use crate::adapter::damage;
use crate::element::DType;
use crate::error::{Error, Result};

/// A tensor of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Its name, such as `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// The type of its elements, as the file spells it: `F32`, `BF16`, `I64`, …
    pub dtype: Dtype,
    /// The length of each dimension.
    pub shape: Vec<usize>,
    /// Where its bytes begin, counted from the beginning of the file.
    pub start: u64,
    /// How many bytes it has.
    pub bytes: usize,
}

impl Entry {
    /// The type of its elements, if it is one of the three this crate computes with.
    pub fn float(&self) -> Option<DType> {
        match self.dtype {
            Dtype::F32 => Some(DType::F32),
            Dtype::F16 => Some(DType::F16),
            Dtype::BF16 => Some(DType::BF16),
            _ => None,
        }
    }

    /// `4096×11008`
    pub fn dimensions(&self) -> String {
        self.shape.iter().map(usize::to_string).collect::<Vec<_>>().join("×")
    }

    /// How many elements it has.
    pub fn elements(&self) -> usize {
        self.shape.iter().product() // the file is at least as long
    }
}

/// The header of a file, as it was written.
#[derive(Clone, Debug)]
pub(super) struct Header {
    /// The length in eight bytes, then the text.
    raw: Vec<u8>,
    /// In the order of their bytes, which fill the rest of the file.
    pub(super) entries: Vec<Entry>,
}

impl Header {
    /// Reads the header of a whole file; looks at no other byte. Errors: [`Error::File`] for what is no such file: too short,
    /// too long, with offsets that overlap, leave gaps or do not fit the shapes.
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
        Ok(Self { raw, entries })
    }

    /// The entry `__metadata__`, or nothing.
    pub(super) fn metadata(&self, path: &Path) -> Result<Map<String, Value>> {
        let mut document = self.document(path)?;
        Ok(document.remove("__metadata__").and_then(|value| value.as_object().cloned()).unwrap_or_default())
    }

    fn document(&self, path: &Path) -> Result<Map<String, Value>> {
        let text = self.raw.get(size_of::<u64>()..).unwrap_or_default();
        serde_json::from_slice(text).map_err(|error| Error::File { path: path.into(), reason: error.to_string() })
    }

    /// The bytes of a header for the same tensors, some of them in other element types. The same bytes if nothing changes.
    ///
    /// Metadata and the order of keys stay. `dtypes` has one for each entry.
    pub(super) fn with_dtypes(&self, path: &Path, dtypes: &[Dtype]) -> Result<Vec<u8>> {
        if self.entries.iter().zip(dtypes).all(|(entry, dtype)| entry.dtype == *dtype) {
            return Ok(self.raw.clone());
        }
        let refused = |error: serde_json::Error| Error::File { path: path.into(), reason: error.to_string() };
        let mut document = self.document(path)?;
        let mut offset = 0;
        for (entry, dtype) in self.entries.iter().zip(dtypes) {
            let end = offset + stored_bytes(entry, *dtype);
            if let Some(Value::Object(info)) = document.get_mut(&entry.name) {
                info.insert("dtype".into(), json!(dtype));
                info.insert("data_offsets".into(), json!([offset, end]));
            }
            offset = end;
        }
        let mut text = serde_json::to_vec(&document).map_err(refused)?;
        text.resize(text.len().next_multiple_of(8), b' ');
        Ok([&(text.len() as u64).to_le_bytes(), text.as_slice()].concat())
    }
}

/// How many bytes a tensor has when its elements are of this type.
pub(super) fn stored_bytes(entry: &Entry, dtype: Dtype) -> usize {
    if dtype == entry.dtype { entry.bytes } else { entry.elements() * dtype.bitsize() / 8 }
}

/// As safetensors spells it.
pub(super) fn spelled(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
    }
}
