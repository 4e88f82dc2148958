//! Output paths: an existing file or folder is replaced only with --overwrite, and an input never.

use std::fs;
use std::path::{Path, PathBuf};

use lowrank::adapter::{CONFIG_FILE, TENSORS_FILE};
use lowrank::file::{StagedFolder, renamed, sync_folder};
use lowrank::{Error, Result};

use crate::rename::{exchange, rename_new};

/// A file or a folder that a subcommand writes.
#[derive(clap::Args)]
pub(crate) struct Out {
    /// Where to write: a file if the input is a file, else a folder
    #[arg(long, value_name = "PATH")]
    pub(crate) out: PathBuf,
    /// Replace an existing output; an input is never replaced
    #[arg(long)]
    overwrite: bool,
}

impl Out {
    /// Checks the path. Errors: [`Error::File`] for an output that exists (without --overwrite), is an input or is within one, and
    /// for a folder that holds neither a model nor an adapter.
    pub(crate) fn begin(&self, inputs: &[&Path]) -> Result<Destination> {
        let Self { out, overwrite } = self;
        unlike_inputs(out, inputs)?;
        let staged = Destination { out: out.clone(), overwrite: *overwrite, staged: true };
        let Ok(there) = out.symlink_metadata() else { return Ok(staged) };
        if !overwrite {
            return refused(out, "exists already; --overwrite replaces it");
        }
        if there.is_dir() {
            let names = fs::read_dir(out).into_iter().flatten().flatten().map(|entry| entry.file_name());
            let names: Vec<String> = names.map(|name| name.to_string_lossy().into_owned()).collect();
            if !names.is_empty() && !names.iter().any(|name| name.ends_with(".safetensors")) {
                return refused(out, "is a folder that holds no model and no adapter; it is not replaced");
            }
        }
        Ok(staged)
    }

    /// [`begin`](Self::begin) for the folder of an adapter, which may hold other files.
    pub(crate) fn begin_adapter(&self, inputs: &[&Path]) -> Result<Destination> {
        let holds = [CONFIG_FILE, TENSORS_FILE].iter().any(|file| self.out.join(file).exists());
        if self.out.is_dir() && !holds {
            unlike_inputs(&self.out, inputs)?;
            return Ok(Destination { out: self.out.clone(), overwrite: false, staged: false });
        }
        self.begin(inputs)
    }

    /// Checks the path of another output, such as a residue. Errors: those of [`begin`](Self::begin).
    pub(crate) fn begin_other(&self, path: &Path, inputs: &[&Path]) -> Result<Destination> {
        unlike_inputs(path, inputs)?;
        match path.symlink_metadata() {
            _ if path == self.out => refused(path, "is the path of the result; give another one"),
            Ok(there) if there.is_dir() || !self.overwrite => refused(path, "exists already; --overwrite replaces a file"),
            _ => Ok(Destination { out: path.into(), overwrite: self.overwrite, staged: true }),
        }
    }
}

/// A place for a result.
pub(crate) struct Destination {
    out: PathBuf,
    overwrite: bool,
    /// False for a folder to which the files of an adapter are added.
    staged: bool,
}

impl Destination {
    /// Calls `write` with a path to write to, and gives what it wrote its name at the end, so that the name is never that of
    /// something incomplete.
    ///
    /// Errors: those of `write`; [`Error::File`] if something else got the name meanwhile, and is not to be overwritten.
    pub(crate) fn write<T>(self, write: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
        let out = &self.out;
        if !self.staged {
            return write(out);
        }
        let beside = StagedFolder::beside(out)?;
        let made = beside.inside().join(out.file_name().unwrap_or_default());
        let written = write(&made).map_err(|error| renamed(error, &made, out))?;
        let published = if !self.overwrite || out.symlink_metadata().is_err() {
            rename_new(&made, out)
        } else {
            exchange(&made, out) // the old one goes with the folder
        };
        published.and_then(|()| sync_folder(out)).map_err(|source| Error::Io { path: out.clone(), source })?;
        Ok(written)
    }
}

/// Errors: [`Error::File`] for an input, a file of weights in an input folder, and a folder that contains an input.
fn unlike_inputs(out: &Path, inputs: &[&Path]) -> Result<()> {
    let Ok(there) = out.canonicalize() else { return Ok(()) };
    for input in inputs.iter().filter_map(|input| input.canonicalize().ok()) {
        let part = there.is_file() && there.parent() == Some(&input) && is_weights(&there);
        if there == input || part || input.starts_with(&there) {
            return refused(out, "is an input of the command, or contains one; an input is never replaced");
        }
    }
    Ok(())
}

fn is_weights(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "safetensors" || extension == "json")
}

fn refused<T>(path: &Path, reason: &str) -> Result<T> {
    Err(Error::File { path: path.into(), reason: reason.into() })
}
