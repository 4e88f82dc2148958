//! Adapters and models in formats other than PEFT's folders and plain safetensors: recognising them, and converting adapters.
//!
//! ```text
//! kind.rs recognise.rs   the kinds of files and folders, and recognising them
//! spelling.rs gguf.rs    how each format names and lays out the tensors of a module
//! raw.rs module.rs       the tensors as they are stored; a module, independent of a format
//! modules.rs             an adapter: read from one format, written in another
//! base.rs                information that a format lacks, from the model or the caller
//! ```

mod base;
mod gguf;
mod kind;
mod module;
mod modules;
mod raw;
mod recognise;
mod spelling;

pub use base::{Base, Hints};
pub use kind::Kind;
pub use modules::Modules;
pub use recognise::{Recognised, TensorInfo, by_first_bytes, by_tensors, outline, recognise};
pub(crate) use recognise::{json_damage, other_kind, sentence, unknown};

use std::collections::BTreeSet;
use std::path::Path;

use super::{CONFIG_FILE, Folder};
use crate::error::{Error, Result};

impl Folder {
    /// Reads a folder that PEFT wrote, or an adapter in another [format](self) that is complete in itself, such as mlx-lm's.
    ///
    /// Errors: [`Error::File`] for a file that is missing or damaged, a tensor that the settings do not include, or one that they
    /// require and that is missing or of another shape; [`Error::Unsupported`] for a setting that this crate does not support.
    pub fn read(dir: &Path) -> Result<Self> {
        Self::read_peft(dir).or_else(|error| foreign(dir, error))
    }
}

/// Reads an adapter in another format than PEFT's, if the format contains all that is needed. `error` is the result of reading it
/// as a PEFT folder. Errors: those of [`explained`].
fn foreign(path: &Path, error: Error) -> Result<Folder> {
    let other = recognise(path).is_ok_and(|found| found.kind.is_adapter() && found.kind != Kind::Peft);
    let modules = other.then(|| Modules::read(path, &Hints::default())).and_then(Result::ok);
    modules.map_or_else(|| Err(explained(path, error)), |modules| modules.folder())
}

/// A better error for a folder that is not a PEFT adapter, if its kind is recognised; else `error`.
pub(super) fn explained(dir: &Path, error: Error) -> Error {
    let reason = |path: &Path, reason: &str| Error::File { path: path.into(), reason: reason.into() };
    match recognise(dir) {
        Ok(found) if found.kind == Kind::Checkpoint && dir.join(CONFIG_FILE).exists() => error,
        Ok(found) if found.kind == Kind::Checkpoint => {
            reason(dir, "is a model, not an adapter; an adapter's folder holds adapter_config.json and adapter_model.safetensors")
        }
        Ok(found) if found.kind == Kind::Peft && dir.is_file() => {
            reason(dir, "holds the tensors of an adapter; name its folder, which holds adapter_config.json as well")
        }
        Ok(found) if found.kind != Kind::Peft => found.refusal(),
        _ => error,
    }
}

/// A line that summarises an adapter in another format than PEFT's, and the names of its modules. Errors: [`Error::File`].
pub fn summary(path: &Path) -> Result<(String, Vec<String>)> {
    let raw = raw::Raw::read(path)?;
    let alphas: BTreeSet<String> = raw.alphas.values().map(|alpha| format!("{alpha}")).collect();
    let some = |values: Vec<String>, none: &str| if values.is_empty() { none.into() } else { values.join(", ") };
    let (ranks, alphas) = (raw.ranks().iter().map(usize::to_string).collect(), alphas.into_iter().collect());
    let modules = format!("{} module{}", raw.parts.len(), if raw.parts.len() == 1 { "" } else { "s" });
    let line = format!("{modules}, rank {}, alpha {}", some(ranks, "unknown"), some(alphas, "not in the file"));
    Ok((line, raw.parts.into_keys().collect()))
}
