//! `adapter_model.safetensors`: reading and writing the tensors of an adapter.

use std::collections::HashMap;
use std::path::Path;

use safetensors::tensor::{SafeTensorError, SafeTensors, TensorView, serialize as to_safetensors};
use serde_json::{Map, Value};

use super::files::{TENSORS_FILE, bad_tensors};
use super::formats::{other_kind, sentence, unknown};
use super::tensors::{HostTensor, HostTensors, stored, widen};
use crate::error::Result;

/// The prefix that PEFT writes before the name of a module. Files without it are accepted too.
pub(super) const PREFIX: &str = "base_model.model.";

/// Parses the bytes of a safetensors file. Errors: [`Error::File`](crate::Error::File) for a damaged file, for element types other than `f32`, `f16`
/// and `bf16`, and for two tensors of one name.
pub fn parse_tensors(bytes: &[u8]) -> Result<HostTensors> {
    let file = SafeTensors::deserialize(bytes)
        .map_err(|error| bad_tensors(damage(Path::new(TENSORS_FILE), bytes, bytes.len() as u64, &error)))?;
    let mut tensors = HostTensors::new();
    for (name, view) in file.iter() {
        let (dtype, values) = widen(view.dtype(), view.data())
            .ok_or_else(|| bad_tensors(format!("`{name}` holds {:?}, want F32, F16 or BF16", view.dtype())))?;
        let short = name.strip_prefix(PREFIX).unwrap_or(name);
        if tensors.insert(short.into(), HostTensor { shape: view.shape().into(), dtype, values }).is_some() {
            return Err(bad_tensors(format!("`{short}` is there twice, with and without `{PREFIX}`")));
        }
    }
    Ok(tensors)
}

/// Describes why a safetensors file of `got` bytes, of which the first are given, cannot be read: it is another kind of file, it
/// is truncated, or else the reader's own message.
pub(crate) fn damage(path: &Path, beginning: &[u8], got: u64, error: &SafeTensorError) -> String {
    if let Some(kind) = other_kind(path, beginning) {
        return sentence(&kind, path);
    }
    match error {
        SafeTensorError::HeaderTooLarge | SafeTensorError::InvalidHeader(_) => unknown(beginning),
        SafeTensorError::HeaderTooSmall | SafeTensorError::InvalidHeaderLength => {
            let header = beginning.first_chunk().map_or(0, |&length| u64::from_le_bytes(length));
            format!("is truncated: {got} bytes, want at least {}", header.saturating_add(8))
        }
        SafeTensorError::MetadataIncompleteBuffer => match end(beginning) {
            Some(want) if want > got => format!("is truncated: {got} bytes, want {want}"),
            Some(want) => format!("is {got} bytes, want {want}: more than its tensors"),
            None => error.to_string(),
        },
        other => other.to_string(),
    }
}

/// The length of the file according to its header: the end of the last tensor.
fn end(beginning: &[u8]) -> Option<u64> {
    let (&length, rest) = beginning.split_first_chunk()?;
    let length = u64::from_le_bytes(length);
    let header: Map<String, Value> = serde_json::from_slice(rest.get(..usize::try_from(length).ok()?)?).ok()?;
    let ends = header.values().filter_map(|info| info.get("data_offsets")?.get(1)?.as_u64());
    ends.max().unwrap_or(0).checked_add(8 + length)
}

/// The bytes of a file with these tensors, each in its own element type, with a prefix before each name. Errors: [`Error::File`]
/// for an element that overflows its type.
pub(super) fn serialize(prefix: &str, tensors: &HostTensors) -> Result<Vec<u8>> {
    let stored = |(name, tensor): (&String, &HostTensor)| {
        let name = format!("{prefix}{name}");
        let (dtype, bytes) = stored(&name, tensor.dtype, &tensor.values)?;
        Ok((name, dtype, tensor.shape.clone(), bytes))
    };
    let data = tensors.iter().map(stored).collect::<Result<Vec<_>>>()?;
    let view = |(name, dtype, shape, bytes)| TensorView::new(dtype, shape, bytes).map(|view| (name, view));
    let views: Result<Vec<_>, _> =
        data.iter().map(|(name, dtype, shape, bytes)| view((name, *dtype, shape.clone(), bytes))).collect();
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    views.and_then(|views| to_safetensors(views, Some(metadata))).map_err(|error| bad_tensors(error.to_string()))
}
