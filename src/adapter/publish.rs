//! Writing adapter folders.

use std::path::PathBuf;

use super::AdapterConfig;
use super::files::{CONFIG_FILE, TENSORS_FILE, at};
use super::tensor_file::{PREFIX, serialize};
use super::tensors::HostTensors;
use crate::error::{Error, Result};
use crate::file::Staged;

/// Writes adapters into their folders: all files completely, or none. Missing folders are created.
pub(super) fn publish(folders: &[(PathBuf, &AdapterConfig, HostTensors)]) -> Result<()> {
    let mut files = Vec::new();
    for (dir, config, tensors) in folders {
        let bytes = serialize(PREFIX, tensors).map_err(|error| at(dir, error))?;
        files.extend([(dir.clone(), TENSORS_FILE, bytes), (dir.clone(), CONFIG_FILE, config.to_json().into_bytes())]);
    }
    write_files(files)
}

/// Writes files into folders: all completely, or none. Missing folders are created.
pub(super) fn write_files(files: Vec<(PathBuf, &str, Vec<u8>)>) -> Result<()> {
    let stage = |(dir, name, bytes): &(PathBuf, &str, Vec<u8>)| {
        std::fs::create_dir_all(dir).map_err(|error| Error::File { path: dir.into(), reason: error.to_string() })?;
        Staged::new(&dir.join(name), bytes)
    };
    let staged = files.iter().map(stage).collect::<Result<Vec<_>>>()?;
    staged.into_iter().try_for_each(Staged::publish)
}
