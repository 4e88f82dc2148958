//! `adapter_model.safetensors`: reading and writing the tensors of an adapter.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensorError, SafeTensors, TensorView, serialize as to_safetensors};
use serde_json::{Map, Value};

use super::{TENSORS_FILE, formats};
use crate::backend::Backend;
use crate::element::{DType, Float, bf16, f16};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// The prefix that PEFT writes before the name of a module. Files without it are accepted too.
pub(super) const PREFIX: &str = "base_model.model.";

/// A tensor in host memory, widened to `f32`, which is exact for `f16` and `bf16`.
#[derive(Clone, Debug, PartialEq)]
pub struct HostTensor {
    /// The length of each dimension.
    pub shape: Vec<usize>,
    /// The element type of the file.
    pub dtype: DType,
    /// The elements, in row-major order.
    pub values: Vec<f32>,
}

impl HostTensor {
    /// Uploads the tensor, rounded to the element type of the backend. A vector of length n becomes `1×n`.
    ///
    /// Errors: [`Error::Value`] for more than two dimensions, for an element that overflows the element type, and if the number of
    /// elements is not that of the shape.
    pub fn to_device<B: Backend>(&self, backend: &B) -> Result<Tensor<B>> {
        let shape = match self.shape[..] {
            [n] => (1, n),
            [rows, cols] => (rows, cols),
            _ => return Err(unfit("shape", spell(&self.shape), "one or two dimensions")),
        };
        let over = |value: f32| unfit("values", value.to_string(), "values that the element type can hold");
        let values = self.values.iter().map(|&value| narrowed::<B::Elem>(value).ok_or_else(|| over(value)));
        Tensor::from_slice(backend, shape, &values.collect::<Result<Vec<_>>>()?)
    }
}

fn unfit(name: &'static str, got: String, want: &'static str) -> Error {
    Error::Value { verb: "to_device", name, got, want: want.into() }
}

/// Tensors by name, without PEFT's prefix: `linear1.lora_A.weight`.
pub type HostTensors = BTreeMap<String, HostTensor>;

/// The name of a factor: `linear1.lora_A.weight`.
pub(super) fn key(layer: &str, factor: &str) -> String {
    format!("{layer}.{factor}.weight")
}

/// Parses the bytes of a safetensors file. Errors: [`Error::File`] for a damaged file, for element types other than `f32`, `f16` and
/// `bf16`, and for two tensors of one name.
pub fn parse_tensors(bytes: &[u8]) -> Result<HostTensors> {
    let file = SafeTensors::deserialize(bytes).map_err(|error| refused(damage(Path::new(TENSORS_FILE), bytes, &error)))?;
    let mut tensors = HostTensors::new();
    for (name, view) in file.iter() {
        let (dtype, values) = widen(view.dtype(), view.data())
            .ok_or_else(|| refused(format!("`{name}` holds {:?}, want F32, F16 or BF16", view.dtype())))?;
        let short = name.strip_prefix(PREFIX).unwrap_or(name);
        if tensors.insert(short.into(), HostTensor { shape: view.shape().into(), dtype, values }).is_some() {
            return Err(refused(format!("`{short}` is there twice, with and without `{PREFIX}`")));
        }
    }
    Ok(tensors)
}

/// Describes why a safetensors file cannot be read: it is another kind of file, it is truncated, or else the reader's own message.
pub(crate) fn damage(path: &Path, file: &[u8], error: &SafeTensorError) -> String {
    let got = file.len() as u64;
    if let Some(kind) = formats::other_kind(path, file) {
        return formats::sentence(&kind, path);
    }
    match error {
        SafeTensorError::HeaderTooLarge | SafeTensorError::InvalidHeader(_) => formats::unknown(file),
        SafeTensorError::HeaderTooSmall | SafeTensorError::InvalidHeaderLength => {
            let header = file.first_chunk().map_or(0, |&length| u64::from_le_bytes(length));
            format!("is truncated: {got} bytes, want at least {}", header.saturating_add(8))
        }
        SafeTensorError::MetadataIncompleteBuffer => match end(file) {
            Some(want) if want > got => format!("is truncated: {got} bytes, want {want}"),
            Some(want) => format!("is {got} bytes, want {want}: more than its tensors"),
            None => error.to_string(),
        },
        other => other.to_string(),
    }
}

/// The length of the file according to its header: the end of the last tensor.
fn end(file: &[u8]) -> Option<u64> {
    let (&length, rest) = file.split_first_chunk()?;
    let length = u64::from_le_bytes(length);
    let header: Map<String, Value> = serde_json::from_slice(rest.get(..usize::try_from(length).ok()?)?).ok()?;
    let ends = header.values().filter_map(|info| info.get("data_offsets")?.get(1)?.as_u64());
    ends.max().unwrap_or(0).checked_add(8 + length)
}

/// The bytes of a file with these tensors, each in its own element type, with a prefix before each name. Errors: [`Error::File`] for an
/// element that overflows its type.
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
    views.and_then(|views| to_safetensors(views, Some(metadata))).map_err(|error| refused(error.to_string()))
}

/// The bytes of one tensor of a file. Errors: those of [`serialize`].
pub(super) fn stored(name: &str, dtype: DType, values: &[f32]) -> Result<(Dtype, Vec<u8>)> {
    Ok(match dtype {
        DType::F32 => (Dtype::F32, little_endian(values)),
        DType::F16 => (Dtype::F16, little_endian(&narrow::<f16>(name, values)?)),
        DType::BF16 => (Dtype::BF16, little_endian(&narrow::<bf16>(name, values)?)),
    })
}

fn little_endian<E: Float>(values: &[E]) -> Vec<u8> {
    let values = values.iter().map(|value| value.to_f32());
    match E::DTYPE {
        DType::F32 => values.flat_map(f32::to_le_bytes).collect(),
        DType::F16 => values.flat_map(|value| f16::from_f32(value).to_le_bytes()).collect(),
        DType::BF16 => values.flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect(),
    }
}

/// The elements of a file as `f32`, and their stored type; `None` for a type other than `f32`, `f16` and `bf16`.
pub(super) fn widen(dtype: Dtype, bytes: &[u8]) -> Option<(DType, Vec<f32>)> {
    let halves = || bytes.as_chunks().0.iter();
    match dtype {
        Dtype::F32 => Some((DType::F32, bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect())),
        Dtype::F16 => Some((DType::F16, halves().map(|&bytes| f16::from_le_bytes(bytes).to_f32()).collect())),
        Dtype::BF16 => Some((DType::BF16, halves().map(|&bytes| bf16::from_le_bytes(bytes).to_f32()).collect())),
        _ => None,
    }
}

/// Rounds to an element type. Errors: [`Error::File`] if a finite element becomes infinite.
pub(super) fn narrow<E: Float>(name: &str, values: &[f32]) -> Result<Vec<E>> {
    let over = |value: f32| refused(format!("`{name}` holds {value}, more than {} can", E::DTYPE));
    values.iter().map(|&value| narrowed(value).ok_or_else(|| over(value))).collect()
}

/// The rounded value; `None` if a finite one would become infinite.
fn narrowed<E: Float>(value: f32) -> Option<E> {
    let narrowed = E::from_f32(value);
    (narrowed.to_f32().is_finite() || !value.is_finite()).then_some(narrowed)
}

/// A shape as text, such as `7×9`.
pub(super) fn spell(shape: &[usize]) -> String {
    shape.iter().map(usize::to_string).collect::<Vec<_>>().join("×")
}

/// An error about the tensors of an adapter; the folder is added to its path later.
pub(super) fn refused(reason: String) -> Error {
    Error::File { path: TENSORS_FILE.into(), reason }
}
