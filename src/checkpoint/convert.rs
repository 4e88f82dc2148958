//! The same checkpoint in another element type.

use std::path::Path;

use safetensors::tensor::Dtype;

use super::header::{Entry, spelled};
use super::rewrite::{Edit, Pass, rewrite};
use super::{Checkpoint, Shard, Watch};
use crate::adapter::formats::Kind;
use crate::element::DType;
use crate::error::Result;

/// Writes a checkpoint whose `f32`, `f16` and `bf16` tensors are of this type, rounded to nearest; all others stay as they are. A
/// `config.json` that is copied along names the new type.
///
/// Errors: [`File`](crate::Error::File), also if a number is more than the type can hold; [`Interrupted`](crate::Error::Interrupted).
pub fn convert(base: &Checkpoint, dtype: DType, out: &Path, mut watch: Watch<'_>) -> Result<()> {
    if matches!(base.kind(), Kind::Quantised(_)) {
        base.is_plain_model()?; // the scales of quantised weights are floats as well, and would be rounded
    }
    rewrite(base, out, &mut Convert(Some(dtype)), &mut watch)?.publish()
}

/// Every float tensor in this type, or as it is.
pub(super) struct Convert(pub(super) Option<DType>);

impl Edit for Convert {
    fn dtype(&self, entry: &Entry) -> Dtype {
        self.0.filter(|_| entry.float().is_some()).map_or(entry.dtype, spelled)
    }

    fn asked(&self) -> Option<DType> {
        self.0
    }

    fn write(&mut self, shard: &Shard, entry: &Entry, pass: &mut Pass<'_, '_>) -> Result<()> {
        match (entry.float(), self.0) {
            (Some(from), Some(to)) if from != to => pass.convert(shard, entry, [from, to]),
            _ => pass.copy(shard, entry),
        }
    }
}
