//! A new checkpoint on its way to the disk: under another name until all of it is there.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use crate::error::{Error, Result};
use crate::file::{Staged, StagedFolder, failed};

/// How much is written before the disk is asked to begin with it.
const FLUSH: usize = 32 << 20;

/// A file that goes to the disk while more of it is made, so that the last synchronisation has little left to do.
pub(super) struct Output {
    path: PathBuf,
    file: File,
    unflushed: usize,
    flush: SyncSender<()>,
    flusher: JoinHandle<std::io::Result<()>>,
}

impl Output {
    /// `path` is what errors call it.
    pub(super) fn new(path: &Path, file: &File) -> Result<Self> {
        let cloned = file.try_clone().and_then(|one| Ok((one, file.try_clone()?)));
        let (file, background) = cloned.map_err(|error| failed(path, &error))?;
        let (flush, asked) = sync_channel(1);
        let flusher = std::thread::spawn(move || asked.into_iter().try_for_each(|()| background.sync_data()));
        Ok(Self { path: path.into(), file, unflushed: 0, flush, flusher })
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|error| failed(&self.path, &error))?;
        self.unflushed += bytes.len();
        // A flusher that is still busy is not asked again; one that failed says so at the end.
        if self.unflushed >= FLUSH && self.flush.try_send(()).is_ok() {
            self.unflushed = 0;
        }
        Ok(())
    }

    /// Waits for the flusher. What it was not asked for is still to be synchronised.
    pub(super) fn finish(self) -> Result<()> {
        drop(self.flush);
        let flushed = self.flusher.join().unwrap_or_else(|_| Err(std::io::Error::other("the flusher died")));
        flushed.map_err(|error| failed(&self.path, &error))
    }
}

/// A checkpoint that is complete on the disk but does not have its name yet. Dropped, it is gone.
pub(super) enum StagedCheckpoint {
    File(Staged),
    Folder(StagedFolder),
}

impl StagedCheckpoint {
    pub(super) fn publish(self) -> Result<()> {
        match self {
            StagedCheckpoint::File(file) => file.publish(),
            StagedCheckpoint::Folder(folder) => folder.publish(),
        }
    }
}

/// Copies what lies beside the weights, such as the config and the tokenizer, so that the new folder loads as the old one did.
pub(super) fn copy_companions(from: &Path, to: &Path) -> Result<()> {
    let folder = if from.as_os_str().is_empty() { Path::new(".") } else { from };
    for entry in std::fs::read_dir(folder).map_err(|error| failed(folder, &error))? {
        let path = entry.map_err(|error| failed(folder, &error))?.path();
        let Some(name) = path.file_name().filter(|name| path.is_file() && is_companion(&name.to_string_lossy())) else {
            continue;
        };
        let copied = to.join(name);
        Staged::with(&copied, |file| {
            let copy = File::open(&path).and_then(|mut source| std::io::copy(&mut source, file));
            copy.map(drop).map_err(|error| failed(&path, &error))
        })?
        .publish()?;
    }
    Ok(())
}

/// Weights in any format are no companions; nor is an index of them.
fn is_companion(name: &str) -> bool {
    const WEIGHTS: [&str; 9] = [".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json"];
    !name.starts_with('.') && !WEIGHTS.iter().any(|ending| name.ends_with(ending))
}

/// `Err` if the caller asked to stop.
pub(super) fn go_on(flow: std::ops::ControlFlow<()>) -> Result<()> {
    if flow.is_break() { Err(Error::Interrupted) } else { Ok(()) }
}
