//! Adapters and models in other formats than PEFT's folders and plain safetensors: what a thing is, and its PEFT folder.
//!
//! ```text
//! kind.rs recognise.rs   what a file or a folder is, and what to do with it
//! spelling.rs gguf.rs    how each format names and lays out the tensors of a module
//! raw.rs modules.rs      the tensors of a module, and the modules: read from one format, written in another
//! base.rs                what a format does not tell, and the model or the caller must
//! ```

mod base;
mod gguf;
mod kind;
mod modules;
mod raw;
mod recognise;
mod spelling;

pub use base::{Base, Hints};
pub use kind::Kind;
pub use modules::Modules;
pub use recognise::{Outline, Thing, by_first_bytes, by_tensors, outline, recognise};
pub(crate) use recognise::{json_damage, other_kind, sentence, unknown};

use std::collections::BTreeSet;
use std::path::Path;

use super::{CONFIG_FILE, Folder};
use crate::error::{Error, Result};

/// The adapter of a folder or a file in another format than PEFT's, where nothing is missing that only the caller can tell. `error` is
/// what reading it as a PEFT folder gave. Errors: those of [`explained`].
pub(super) fn foreign(path: &Path, error: Error) -> Result<Folder> {
    let other = recognise(path).is_ok_and(|thing| thing.kind.is_adapter() && thing.kind != Kind::Peft);
    let modules = other.then(|| Modules::read(path, &Hints::default())).and_then(Result::ok);
    modules.map_or_else(|| Err(explained(path, error)), |modules| modules.folder())
}

/// Why the adapter in a folder is refused: what the folder holds, where it is something else than a PEFT adapter; else the error.
pub(super) fn explained(dir: &Path, error: Error) -> Error {
    let reason = |path: &Path, reason: &str| Error::File { path: path.into(), reason: reason.into() };
    match recognise(dir) {
        Ok(thing) if thing.kind == Kind::Checkpoint && dir.join(CONFIG_FILE).exists() => error,
        Ok(thing) if thing.kind == Kind::Checkpoint => {
            reason(dir, "is a model, not an adapter; an adapter's folder holds adapter_config.json and adapter_model.safetensors")
        }
        Ok(thing) if thing.kind == Kind::Peft && dir.is_file() => {
            reason(dir, "holds the tensors of an adapter; name its folder, which holds adapter_config.json as well")
        }
        Ok(thing) if thing.kind != Kind::Peft => thing.refused(),
        _ => error,
    }
}

/// A line on the modules of an adapter in another format than PEFT's, and their names. Errors: [`Error::File`].
pub fn summary(path: &Path) -> Result<(String, Vec<String>)> {
    let raw = raw::Raw::read(path)?;
    let alphas: BTreeSet<String> = raw.alphas.values().map(|alpha| format!("{alpha}")).collect();
    let some = |values: Vec<String>, none: &str| if values.is_empty() { none.into() } else { values.join(", ") };
    let (ranks, alphas) = (raw.ranks().iter().map(usize::to_string).collect(), alphas.into_iter().collect());
    let line =
        format!("{} modules, rank {}, alpha {}", raw.parts.len(), some(ranks, "unknown"), some(alphas, "not told by the file"));
    Ok((line, raw.parts.into_keys().collect()))
}
