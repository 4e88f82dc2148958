//! Choosing the checkpoint of a folder.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::{INDEX, listed, read_index, refused};
use crate::adapter::TENSORS_FILE;
use crate::error::Result;
use crate::file::failed;

const WEIGHTS: &str = ".safetensors";
/// The names (without extension) of files and indices that libraries look for.
const USUAL: [&str; 2] = ["model", "diffusion_pytorch_model"];

/// The `.safetensors` file or the index of a folder, with a note if there was a doubt.
///
/// Errors: [`Error::File`](crate::Error::File) for a folder with no checkpoint or several.
pub(super) fn main_file(folder: &Path) -> Result<(PathBuf, Option<String>)> {
    let listing = std::fs::read_dir(folder).and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect());
    let paths: Vec<PathBuf> = listing.map_err(|error| failed(folder, error))?;
    let name = |path: &PathBuf| path.file_name().map(|name| name.to_string_lossy().into_owned());
    let names: BTreeSet<String> = paths.iter().filter_map(name).filter(|name| !name.starts_with('.')).collect();
    let stems =
        |ending: &str| -> Vec<String> { names.iter().filter_map(|name| Some(name.strip_suffix(ending)?.to_string())).collect() };

    // An index is valid if all its shards exist. Shards are not checkpoints by themselves.
    let (mut whole, mut stale, mut shards) = (BTreeSet::new(), BTreeMap::new(), BTreeSet::new());
    for stem in stems(INDEX) {
        let files: BTreeSet<String> = read_index(&folder.join(format!("{stem}{INDEX}")))?.into_values().collect();
        match files.iter().find(|file| !names.contains(*file)) {
            None => drop(whole.insert(stem)),
            Some(missing) => drop(stale.insert(stem, missing.clone())),
        }
        shards.extend(files);
    }
    let single = |stem: &String| {
        let file = format!("{stem}{WEIGHTS}");
        file != TENSORS_FILE && (!shards.contains(&file) || USUAL.contains(&stem.as_str())) && !is_shard(stem)
    };
    let singles: Vec<String> = stems(WEIGHTS).into_iter().filter(single).collect();

    let usual = USUAL.into_iter().map(String::from).find(|stem| whole.contains(stem) || singles.contains(stem));
    let others: BTreeSet<&String> = whole.iter().chain(&singles).collect();
    let stem = match (usual, others.len()) {
        (Some(stem), _) => stem,
        (None, 1) => others.into_iter().next().cloned().unwrap_or_default(),
        (None, 0) if names.contains(TENSORS_FILE) => return Ok((folder.join(TENSORS_FILE), None)),
        (None, 0) => return Err(nothing(folder, &paths, &stale)),
        (None, _) => {
            let files: Vec<String> = others.into_iter().map(|stem| format!("{stem}{WEIGHTS}")).collect();
            return Err(refused(folder, format!("holds several checkpoints: {}; name the file that is meant", listed(&files))));
        }
    };
    let (file, index) = (format!("{stem}{WEIGHTS}"), format!("{stem}{INDEX}"));
    match (singles.contains(&stem), whole.contains(&stem), stale.get(&stem)) {
        (true, true, _) => {
            let reason = format!("holds two checkpoints, `{file}` and the shards of `{index}`; name the one that is meant");
            Err(refused(folder, format!("{reason} (transformers reads `{file}`), or remove the other")))
        }
        (true, false, Some(missing)) => {
            let note = format!("`{index}` is stale: its shard `{missing}` is missing; `{file}` is read, as transformers does");
            Ok((folder.join(file), Some(note)))
        }
        (true, false, None) => Ok((folder.join(file), None)),
        (false, ..) => Ok((folder.join(index), None)),
    }
}

/// True if a file has the name of a shard, such as `model-00001-of-00002`.
fn is_shard(stem: &str) -> bool {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let numbers = stem.rsplit_once("-of-").and_then(|(above, count)| Some((above.rsplit_once('-')?.1, count)));
    numbers.is_some_and(|(number, count)| digits(number) && digits(count))
}

/// The error for a folder without a checkpoint, with the sub-folders that may hold one.
fn nothing(folder: &Path, paths: &[PathBuf], stale: &BTreeMap<String, String>) -> crate::Error {
    if let Some((stem, missing)) = stale.first_key_value() {
        return refused(&folder.join(missing), format!("is missing, which `{stem}{INDEX}` names"));
    }
    let holds = |path: &&PathBuf| {
        let inside = std::fs::read_dir(path).into_iter().flatten().flatten();
        path.is_dir() && inside.into_iter().any(|entry| entry.file_name().to_string_lossy().ends_with(WEIGHTS))
    };
    let mut parts: Vec<String> = paths.iter().filter(holds).map(|path| path.display().to_string()).collect();
    parts.sort();
    let hint =
        if parts.is_empty() { String::new() } else { format!("; look in {}, and name the one that is meant", listed(&parts)) };
    refused(folder, format!("holds no {WEIGHTS} file of a model{hint}"))
}
