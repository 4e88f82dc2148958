//! The tensors of a model's folder.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::safetensors::BufferedSafetensors;
use candle_core::{DType, Device, Tensor};
use serde_json::Value;

use crate::{Error, Result};

/// The file of a model that is in one piece.
pub(crate) const WHOLE: &str = "model.safetensors";
/// The file that says which shard holds which tensor.
const INDEX: &str = "model.safetensors.index.json";

/// Tensors by name, taken one by one.
pub(super) struct Tensors {
    tensors: HashMap<String, Tensor>,
    dtype: DType,
}

impl Tensors {
    pub(super) fn new(tensors: HashMap<String, Tensor>, dtype: DType) -> Self {
        Self { tensors, dtype }
    }

    /// The tensor of this name. Errors: if it is missing, or has another shape.
    pub(super) fn take(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = self.tensors.remove(name).ok_or_else(|| Error::file(Path::new(WHOLE), format!("`{name}` is missing")))?;
        if tensor.dims() != shape {
            return Err(Error::file(Path::new(WHOLE), format!("`{name}` is {:?}, want {shape:?}", tensor.dims())));
        }
        Ok(tensor.to_dtype(self.dtype)?)
    }
}

/// All tensors of a folder, in one piece or in shards, as `dtype`.
pub(super) fn read_tensors(dir: &Path, dtype: DType) -> Result<HashMap<String, Tensor>> {
    let mut tensors = HashMap::new();
    for path in shards(dir)? {
        let bytes = std::fs::read(&path).map_err(|error| Error::file(&path, error))?;
        let file = BufferedSafetensors::new(bytes).map_err(|error| Error::file(&path, one_line(&error)))?;
        for (name, _) in file.tensors() {
            let tensor = file.load(&name, &Device::Cpu).and_then(|tensor| tensor.to_dtype(dtype));
            tensors.insert(name, tensor.map_err(|error| Error::file(&path, one_line(&error)))?);
        }
    }
    Ok(tensors)
}

/// The first line of an error: others may be a backtrace.
fn one_line(error: &candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_string()
}

/// The files that hold the tensors, each once.
fn shards(dir: &Path) -> Result<Vec<PathBuf>> {
    let (whole, index) = (dir.join(WHOLE), dir.join(INDEX));
    if whole.is_file() || !index.is_file() {
        return Ok(vec![whole]);
    }
    let bytes = std::fs::read(&index).map_err(|error| Error::file(&index, error))?;
    let document: Value = serde_json::from_slice(&bytes).map_err(|error| Error::file(&index, error))?;
    let map = document.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| Error::file(&index, "`weight_map` is missing"))?;
    let mut names = Vec::new();
    for (tensor, shard) in map {
        let plain = |name: &&str| !name.contains(['/', '\\']) && name.ends_with(".safetensors");
        let name = shard
            .as_str()
            .filter(plain)
            .ok_or_else(|| Error::file(&index, format!("`{tensor}` is in {shard}, want a file of the folder")))?;
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names.into_iter().map(|name| dir.join(name)).collect())
}
