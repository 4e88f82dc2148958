//! Copying the other files of a model's folder: config, tokenizer, folders of other modules.

use std::fs::File;
use std::path::{Path, PathBuf};

use super::model::{ConfigEdit, MODEL_CONFIG};
use super::{Checkpoint, listed};
use crate::adapter::{CONFIG_FILE, TENSORS_FILE};
use crate::error::{Error, Result};
use crate::file::{self, Staged, failed};

/// Files of an adapter's folder that replace those of the model: tokenizer, chat template, generation config.
const OF_ADAPTERS: [&str; 15] = [
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
];
/// The endings of files with weights, in all formats, and of their indices.
const WEIGHTS: [&str; 9] = [".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json"];

/// Copies the other files of the folder, such as the config and the tokenizer, so that the new folder can be loaded like the old one. The
/// config is edited to describe the new weights, and the tokenizer of the adapter's folder, if it has one, replaces that of the base.
/// Returns notes about files that were copied from the adapter and about files that were not copied.
pub(super) fn copy_companions(base: &Checkpoint, to: &Path, edit: &ConfigEdit, adapter: Option<&Path>) -> Result<Vec<String>> {
    let (Some(folder), mut notes) = (base.parent(), Vec::new()) else { return Ok(Vec::new()) };
    let own = base.shards.iter().any(|shard| shard.path.file_name().is_some_and(|name| name == TENSORS_FILE));
    let mut not_copied = Vec::new();
    for path in listing(folder)? {
        let name = name_of(&path);
        match path {
            path if name.starts_with('.') || name == CONFIG_FILE && !own => drop(path),
            path if path.is_dir() => copy_folder(folder, &path, &to.join(name), &mut notes)?,
            path if is_weights(&name) => {
                not_copied.extend((!base.holds(&path) && !name.ends_with(".index.json")).then_some(name))
            }
            path if name == MODEL_CONFIG => match edit.apply(&file::read(&path)?) {
                Some(bytes) => file::write_whole(&to.join(name), &bytes)?,
                None => copy(&path, &to.join(name))?,
            },
            path => copy(&path, &to.join(name))?,
        }
    }
    if !not_copied.is_empty() {
        notes.push(format!("not copied: {}, which are not the weights of the model that was read", listed(&not_copied)));
    }
    notes.extend(adapter.map(|adapter| copy_of_adapter(adapter, to)).transpose()?.unwrap_or_default());
    Ok(notes)
}

/// Copies the tokenizer of an adapter over that of the base.
fn copy_of_adapter(adapter: &Path, to: &Path) -> Result<Vec<String>> {
    let (mut replaced, mut new) = (Vec::new(), Vec::new());
    for name in OF_ADAPTERS {
        let (from, to) = (adapter.join(name), to.join(name));
        if !from.is_file() || to.is_file() && file::read(&from)? == file::read(&to)? {
            continue;
        }
        if to.is_file() {
            replaced.push(name.to_string())
        } else {
            new.push(name.to_string())
        }
        copy(&from, &to)?;
    }
    let notes = [(replaced, "in place of the base's"), (new, "which the base does not have")];
    let notes = notes.iter().filter(|(names, _)| !names.is_empty());
    Ok(notes.map(|(names, what)| format!("from the adapter's folder: {}, {what}", listed(names))).collect())
}

/// Copies a sub-folder: completely if it is a module of the model, else without files of weights.
fn copy_folder(base: &Path, from: &Path, to: &Path, notes: &mut Vec<String>) -> Result<()> {
    let name = name_of(from);
    let other = if from.is_symlink() {
        Some("a link to another folder")
    } else if from.join(CONFIG_FILE).exists() {
        Some("which holds an adapter")
    } else if name.starts_with("checkpoint-") {
        Some("a checkpoint of the training")
    } else {
        None
    };
    if let Some(what) = other {
        notes.push(format!("not copied: the folder `{name}`, {what}"));
        return Ok(());
    }
    let module = names_modules(base, &name);
    let (mut copied, mut not_copied) = (0, Vec::new());
    copy_inside(from, to, module, &mut copied, &mut not_copied)?;
    if copied > 0 {
        notes.push(format!("copied: the folder `{name}` ({copied} files)"));
    }
    if !not_copied.is_empty() {
        notes.push(format!("not copied: {} in the folder `{name}`: weights that nothing was merged into", listed(&not_copied)));
    }
    Ok(())
}

fn copy_inside(from: &Path, to: &Path, whole: bool, copied: &mut usize, not_copied: &mut Vec<String>) -> Result<()> {
    for path in listing(from)? {
        let name = name_of(&path);
        if name.starts_with('.') || path.is_dir() && path.is_symlink() {
            continue;
        }
        if path.is_dir() {
            copy_inside(&path, &to.join(name), whole, copied, not_copied)?;
        } else if is_weights(&name) && !whole {
            not_copied.push(name);
        } else {
            std::fs::create_dir_all(to).map_err(|error| failed(to, error))?;
            copy(&path, &to.join(name))?;
            *copied += 1;
        }
    }
    Ok(())
}

/// True if the `modules.json` of a model (sentence-transformers) lists this folder.
fn names_modules(base: &Path, name: &str) -> bool {
    let modules = std::fs::read(base.join("modules.json")).ok();
    let modules = modules.and_then(|bytes| serde_json::from_slice::<serde_json::Value>(&bytes).ok());
    let mut modules = modules.iter().filter_map(serde_json::Value::as_array).flatten();
    modules.any(|module| module.get("path").and_then(serde_json::Value::as_str) == Some(name))
}

/// Copies a file: completely, or not at all.
fn copy(from: &Path, to: &Path) -> Result<()> {
    let staged = Staged::with(to, |file| {
        let copy = File::open(from).and_then(|mut source| std::io::copy(&mut source, file));
        copy.map(drop).map_err(|error| failed(from, error))
    })?;
    staged.publish()
}

fn listing(folder: &Path) -> Result<Vec<PathBuf>> {
    let listed = std::fs::read_dir(folder).and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect());
    let mut paths: Vec<PathBuf> = listed.map_err(|error: std::io::Error| -> Error { failed(folder, error) })?;
    paths.sort();
    Ok(paths)
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn is_weights(name: &str) -> bool {
    WEIGHTS.iter().any(|ending| name.ends_with(ending))
}
