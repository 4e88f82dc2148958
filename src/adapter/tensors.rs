//! `adapter_model.safetensors`: the factors of an adapter, by name.

use std::collections::{BTreeMap, HashMap};

use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize as to_safetensors};

use super::TENSORS_FILE;
use crate::element::{DType, Float, bf16, f16};
use crate::error::{Error, Result};

/// What PEFT puts before the name of a module; files without it are read as well.
pub(super) const PREFIX: &str = "base_model.model.";

/// A tensor in host memory, widened to `f32`, which holds every `f16` and `bf16` exactly.
#[derive(Clone, Debug, PartialEq)]
pub struct HostTensor {
    /// The length of each dimension.
    pub shape: Vec<usize>,
    /// The elements, row by row.
    pub values: Vec<f32>,
}

/// Tensors by name, without PEFT's prefix: `linear1.lora_A.weight`.
pub type HostTensors = BTreeMap<String, HostTensor>;

/// The name of a factor: `linear1.lora_A.weight`.
pub(super) fn key(layer: &str, factor: &str) -> String {
    format!("{layer}.{factor}.weight")
}

/// Reads the bytes of a safetensors file. Errors: [`Error::File`] for anything but `f32`, `f16` and `bf16` tensors, each
/// under one name, that fill the file.
pub fn parse_tensors(bytes: &[u8]) -> Result<HostTensors> {
    let file = SafeTensors::deserialize(bytes).map_err(|error| refused(error.to_string()))?;
    let mut tensors = HostTensors::new();
    for (name, view) in file.iter() {
        let values = widen(view.dtype(), view.data()).ok_or_else(|| {
            refused(format!("`{name}` holds {:?}, want F32, F16 or BF16", view.dtype())) // as the file spells them
        })?;
        let short = name.strip_prefix(PREFIX).unwrap_or(name);
        if tensors.insert(short.into(), HostTensor { shape: view.shape().into(), values }).is_some() {
            return Err(refused(format!("`{short}` is there twice, with and without `{PREFIX}`")));
        }
    }
    Ok(tensors)
}

/// A tensor of an adapter on its way to or from a file: its name without the prefix, and its shape there.
pub(super) struct Entry<T> {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    pub(super) tensor: T,
}

/// The bytes of a file with these tensors, in the element type they have.
pub(super) fn serialize<E: Float>(tensors: Vec<Entry<Vec<E>>>) -> Result<Vec<u8>> {
    let bytes = |Entry { name, shape, tensor }: Entry<Vec<E>>| (format!("{PREFIX}{name}"), shape, little_endian(&tensor));
    let data: Vec<_> = tensors.into_iter().map(bytes).collect();
    let dtype = match E::DTYPE {
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
    };
    let view = |(name, shape, bytes)| TensorView::new(dtype, shape, bytes).map(|view| (name, view));
    let views: Result<Vec<_>, _> = data.iter().map(|(name, shape, bytes)| view((name, shape.clone(), bytes))).collect();
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    views.and_then(|views| to_safetensors(views, Some(metadata))).map_err(|error| refused(error.to_string()))
}

pub(super) fn little_endian<E: Float>(values: &[E]) -> Vec<u8> {
    let values = values.iter().map(|value| value.to_f32());
    match E::DTYPE {
        DType::F32 => values.flat_map(f32::to_le_bytes).collect(),
        DType::F16 => values.flat_map(|value| f16::from_f32(value).to_le_bytes()).collect(),
        DType::BF16 => values.flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect(),
    }
}

/// The elements of a file as `f32`; `None` for a type that is not one of the three.
pub(super) fn widen(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    let halves = || bytes.as_chunks().0.iter();
    match dtype {
        Dtype::F32 => Some(bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()),
        Dtype::F16 => Some(halves().map(|&bytes| f16::from_le_bytes(bytes).to_f32()).collect()),
        Dtype::BF16 => Some(halves().map(|&bytes| bf16::from_le_bytes(bytes).to_f32()).collect()),
        _ => None,
    }
}

/// Rounded to the element type of a backend. Errors: [`Error::File`] where a finite number becomes infinite.
pub(super) fn narrow<E: Float>(name: &str, values: &[f32]) -> Result<Vec<E>> {
    let narrow = |&value: &f32| {
        let narrowed = E::from_f32(value);
        let fits = narrowed.to_f32().is_finite() || !value.is_finite();
        if fits { Ok(narrowed) } else { Err(refused(format!("`{name}` holds {value}, more than {} can", E::DTYPE))) }
    };
    values.iter().map(narrow).collect()
}

/// What is wrong with the file, before it is known where it lies.
pub(super) fn refused(reason: String) -> Error {
    Error::File { path: TENSORS_FILE.into(), reason }
}
