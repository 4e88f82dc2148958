//! Output paths: an existing file or folder is replaced only with --overwrite, and an input never.

use std::fs;
use std::path::{Path, PathBuf};

use lowrank::adapter::{CONFIG_FILE, TENSORS_FILE};
use lowrank::{Error, Result};

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
    /// The path to write to. When everything is written, [`Destination::publish`] must be called.
    ///
    /// Errors: [`Error::File`] for an output that exists (without --overwrite), is an input or is within one, and for a folder that holds
    /// neither a model nor an adapter.
    pub(crate) fn begin(&self, inputs: &[&Path]) -> Result<Destination> {
        let Self { out, overwrite } = self;
        unlike_inputs(out, inputs)?;
        let Ok(there) = out.symlink_metadata() else { return Ok(Destination { temporary: out.clone(), replaces: None }) };
        if !overwrite {
            return refused(out, "exists already; --overwrite replaces it");
        }
        if !there.is_dir() {
            return Ok(Destination { temporary: out.clone(), replaces: None });
        }
        let names = fs::read_dir(out).into_iter().flatten().flatten().map(|entry| entry.file_name());
        let names: Vec<String> = names.map(|name| name.to_string_lossy().into_owned()).collect();
        if !names.is_empty() && !names.iter().any(|name| name.ends_with(".safetensors")) {
            return refused(out, "is a folder that holds no model and no adapter; it is not replaced");
        }
        let name = out.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let temporary = out.with_file_name(format!(".{name}.new-{}", std::process::id()));
        Ok(Destination { temporary, replaces: Some(out.clone()) })
    }

    /// [`begin`](Self::begin) for the folder of an adapter, which may hold other files.
    pub(crate) fn begin_adapter(&self, inputs: &[&Path]) -> Result<Destination> {
        let holds = [CONFIG_FILE, TENSORS_FILE].iter().any(|file| self.out.join(file).exists());
        if self.out.is_dir() && !holds {
            unlike_inputs(&self.out, inputs)?;
            return Ok(Destination { temporary: self.out.clone(), replaces: None });
        }
        self.begin(inputs)
    }
}

/// Checks the path of another output, such as a residue. Errors: those of [`Out::begin`].
pub(crate) fn check_unused(path: &Path, result: &Out, inputs: &[&Path]) -> Result<()> {
    unlike_inputs(path, inputs)?;
    match path.symlink_metadata() {
        _ if path == result.out => refused(path, "is the path of the result; give another one"),
        Ok(there) if there.is_dir() || !result.overwrite => refused(path, "exists already; --overwrite replaces a file"),
        _ => Ok(()),
    }
}

/// The path to write to.
pub(crate) struct Destination {
    temporary: PathBuf,
    replaces: Option<PathBuf>,
}

impl Destination {
    pub(crate) fn path(&self) -> &Path {
        &self.temporary
    }

    /// Gives the result its name; an existing folder is replaced.
    pub(crate) fn publish(self) -> Result<()> {
        let Some(out) = &self.replaces else { return Ok(()) };
        let old = self.temporary.with_extension("old");
        let swapped =
            fs::rename(out, &old).and_then(|()| fs::rename(&self.temporary, out)).and_then(|()| fs::remove_dir_all(&old));
        swapped.map_err(|error| Error::File { path: out.clone(), reason: error.to_string() })
    }
}

impl Drop for Destination {
    fn drop(&mut self) {
        if self.replaces.is_some() {
            let _ = fs::remove_dir_all(&self.temporary); // exists only if something failed
        }
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
