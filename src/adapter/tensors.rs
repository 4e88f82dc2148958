//! Tensors in host memory, and their conversion to and from the element types of files and backends.

use std::collections::BTreeMap;

use safetensors::tensor::Dtype;

use super::convert_elements;
use super::files::bad_tensors;
use crate::backend::Backend;
use crate::element::{DType, Float};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

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
    /// Errors: [`Error::Value`] for more than two dimensions, for an element that overflows the element type, and if the number
    /// of elements is not that of the shape.
    pub fn to_device<B: Backend>(&self, backend: &B) -> Result<Tensor<B>> {
        let shape = match self.shape[..] {
            [n] => (1, n),
            [rows, cols] => (rows, cols),
            _ => return Err(unfit("shape", dimensions(&self.shape), "one or two dimensions")),
        };
        let over = |value: f32| unfit("values", value.to_string(), "values that the element type can hold");
        let values = self.values.iter().map(|&value| rounded::<B::Elem>(value).ok_or_else(|| over(value)));
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

/// The bytes of one tensor of a file. Errors: [`Error::File`] for an element that overflows its type.
pub(super) fn stored(name: &str, dtype: DType, values: &[f32]) -> Result<(Dtype, Vec<u8>)> {
    let mut bytes = vec![0; values.len() * dtype.size()];
    if !convert_elements::round(dtype, values, &mut bytes)
        && let Some(value) = convert_elements::overflowing(dtype, values, &bytes)
    {
        return Err(bad_tensors(format!("`{name}` holds {value}, more than {dtype} can")));
    }
    Ok((stored_type(dtype), bytes))
}

/// The elements of a file as `f32`, and their stored type; `None` for a type other than `f32`, `f16` and `bf16`.
pub(super) fn widen(dtype: Dtype, bytes: &[u8]) -> Option<(DType, Vec<f32>)> {
    let dtype = float_type(dtype)?;
    let mut values = vec![0.0; bytes.len() / dtype.size()];
    convert_elements::widen(dtype, bytes, &mut values);
    Some((dtype, values))
}

/// An element type of safetensors, if it is `f32`, `f16` or `bf16`.
pub(crate) fn float_type(dtype: Dtype) -> Option<DType> {
    match dtype {
        Dtype::F32 => Some(DType::F32),
        Dtype::F16 => Some(DType::F16),
        Dtype::BF16 => Some(DType::BF16),
        _ => None,
    }
}

/// An element type in the spelling of safetensors.
pub(crate) fn stored_type(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
    }
}

/// Rounds to an element type. Errors: [`Error::File`] if a finite element becomes infinite.
pub(super) fn round<E: Float>(name: &str, values: &[f32]) -> Result<Vec<E>> {
    let over = |value: f32| bad_tensors(format!("`{name}` holds {value}, more than {} can", E::DTYPE));
    values.iter().map(|&value| rounded(value).ok_or_else(|| over(value))).collect()
}

/// The rounded value; `None` if a finite one would become infinite.
fn rounded<E: Float>(value: f32) -> Option<E> {
    let rounded = E::from_f32(value);
    (rounded.to_f32().is_finite() || !value.is_finite()).then_some(rounded)
}

/// A shape as text, such as `7×9`.
pub(crate) fn dimensions(shape: &[usize]) -> String {
    shape.iter().map(usize::to_string).collect::<Vec<_>>().join("×")
}

/// The module that a weight or a bias belongs to.
pub(crate) fn module_of(tensor: &str) -> &str {
    tensor.rsplit_once('.').map_or(tensor, |(module, _)| module)
}
