//! Converting a checkpoint to another element type.

use std::path::Path;

use super::header::{Entry, spelled};
use super::model::ConfigEdit;
use super::rewrite::{Edit, Pass, rewrite};
use super::{Checkpoint, Shard, Watch};
use crate::adapter::formats::Kind;
use crate::element::DType;
use crate::error::Result;

/// Writes a checkpoint whose `f32`, `f16` and `bf16` tensors are rounded to this type, to the nearest; all others are copied. A
/// `config.json` is copied too, with the new type.
///
/// Errors: [`File`](crate::Error::File), also if an element overflows the type; [`Interrupted`](crate::Error::Interrupted).
pub fn convert(base: &Checkpoint, dtype: DType, out: &Path, mut watch: Watch<'_>) -> Result<()> {
    if matches!(base.kind(), Kind::Quantised(_)) {
        base.check_plain_model()?; // refused, because the scales of quantised weights are floats too and would be rounded
    }
    rewrite(base, out, &mut Convert(Some(dtype)), &mut watch)?.0.publish()
}

/// Converts every float tensor to this type; `None` copies it.
pub(super) struct Convert(pub(super) Option<DType>);

impl Edit for Convert {
    fn stored(&self, entry: &Entry) -> Entry {
        entry.with_dtype(self.0.filter(|_| entry.float().is_some()).map_or(entry.dtype, spelled))
    }

    fn config(&self) -> ConfigEdit {
        ConfigEdit { dtype: self.0, ..ConfigEdit::default() }
    }

    fn write(&mut self, shard: &Shard, entry: &Entry, pass: &mut Pass<'_, '_>) -> Result<()> {
        match (entry.float(), self.0) {
            (Some(from), Some(to)) if from != to => pass.convert(shard, entry, [from, to]),
            _ => pass.copy(shard, entry),
        }
    }
}
