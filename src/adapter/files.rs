//! The files of an adapter folder, and errors about them.

use std::path::Path;

use crate::error::Error;

/// The file name of an adapter's settings.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The file name of an adapter's tensors.
pub const TENSORS_FILE: &str = "adapter_model.safetensors";

/// Adds the folder to the path of an error.
pub(super) fn at(dir: &Path, error: Error) -> Error {
    match error {
        Error::File { path, reason } => Error::File { path: dir.join(path), reason },
        Error::Unsupported { path, field, value } => Error::Unsupported { path: dir.join(path), field, value },
        other => other,
    }
}

/// An error about a file.
pub(super) fn bad_file(path: &Path, reason: String) -> Error {
    Error::File { path: path.into(), reason }
}

/// An error about the config; the folder is added to its path later.
pub(super) fn bad_config(reason: String) -> Error {
    Error::File { path: CONFIG_FILE.into(), reason }
}

/// An error about the tensors of an adapter; the folder is added to its path later.
pub(super) fn bad_tensors(reason: String) -> Error {
    Error::File { path: TENSORS_FILE.into(), reason }
}

/// The start of a text, so that a long value does not fill a message.
pub(super) fn brief(text: &str) -> String {
    const LONGEST: usize = 60;
    let mut brief: String = text.chars().take(LONGEST).collect();
    if brief.len() < text.len() {
        brief.push('…');
    }
    brief
}
