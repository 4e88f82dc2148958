//! Adapters and models in other formats than PEFT's folders and plain safetensors: what a thing is, and its PEFT folder.
//!
//! ```text
//! kind.rs recognise.rs   what a file or a folder is, and what to do with it
//! spelling.rs gguf.rs    how each format names and lays out the tensors of a module
//! ```

mod gguf;
mod kind;
mod recognise;
mod spelling;

pub use kind::Kind;
pub use recognise::{Outline, Thing, by_first_bytes, by_tensors, outline, recognise};
pub(crate) use recognise::{json_damage, sentence, unknown};

use std::path::Path;

use super::CONFIG_FILE;
use crate::error::Error;

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
