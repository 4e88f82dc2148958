//! Reading a checkpoint, with everything that it claims checked.

use std::collections::BTreeSet;
use std::path::Path;

use safetensors::tensor::SafeTensors;

use super::metadata::Metadata;
use super::{bad, fingerprint};
use crate::adapter::{damage, dimensions, float_type};
use crate::backend::Backend;
use crate::element::Float;
use crate::error::Result;
use crate::tensor::{Shape, Tensor};

/// The content of a file that is a complete checkpoint.
pub(super) struct Reader<'f> {
    path: &'f Path,
    tensors: SafeTensors<'f>,
    pub(super) metadata: Metadata,
}

impl<'f> Reader<'f> {
    /// Errors: [`Error::File`](crate::Error::File) for a file that is damaged, or no checkpoint.
    pub(super) fn new(path: &'f Path, bytes: &'f [u8]) -> Result<Self> {
        let damaged = |error| bad(path, damage(path, bytes, bytes.len() as u64, &error));
        let tensors = SafeTensors::deserialize(bytes).map_err(damaged)?;
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(damaged)?;
        let tensors_are = fingerprint(tensors.iter().map(|(name, view)| (name, view.data())));
        let metadata = Metadata::read(path, header.metadata().as_ref(), tensors_are)?;
        Ok(Self { path, tensors, metadata })
    }

    /// A tensor, uploaded as it is. Errors: [`Error::File`](crate::Error::File) if it is not there, or has another type or
    /// shape.
    pub(super) fn tensor<B: Backend, E: Float>(&self, backend: &B, name: &str, shape: Shape) -> Result<Tensor<B, E>> {
        let missing = || bad(self.path, format!("has no `{name}`, which this model trains"));
        let view = self.tensors.tensor(name).map_err(|_| missing())?;
        let (got, want) = (view.shape(), [shape.rows, shape.cols]);
        if got != want || float_type(view.dtype()) != Some(E::DTYPE) {
            let got = format!("{} {:?}", dimensions(got), view.dtype());
            return Err(bad(self.path, format!("`{name}` is {got}, and this model has {shape} {}", E::DTYPE)));
        }
        let host: Vec<E> = view.data().chunks_exact(size_of::<E>()).map(bytemuck::pod_read_unaligned).collect();
        Tensor::from_slice(backend, shape, &host)
    }

    /// Errors: [`Error::File`](crate::Error::File) for a parameter that is not among these; the first by name is named.
    pub(super) fn check_all_known(&self, names: &BTreeSet<String>) -> Result<()> {
        let stored = self.tensors.names().into_iter().filter_map(|name| name.strip_prefix("param."));
        match stored.filter(|name| !names.contains(*name)).min() {
            Some(name) => Err(bad(self.path, format!("has a parameter `{name}`, which this model does not train"))),
            None => Ok(()),
        }
    }
}
