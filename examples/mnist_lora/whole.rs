//! Files are written whole or not at all: beside their name first, then renamed. Ctrl-C waits for a rename, never for a
//! download or for training.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use lowrank::{Error, Result};

/// Held while something is being written.
static WRITING: Mutex<()> = Mutex::new(());

/// Makes Ctrl-C end the process between two writes, never in one.
pub fn guard_against_ctrl_c() -> Result<(), ctrlc::Error> {
    ctrlc::set_handler(|| {
        let _between_writes = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
        eprintln!();
        std::process::exit(130) // 128 + SIGINT, as shells have it
    })
}

/// Runs what writes files, and is not to be cut off by Ctrl-C.
pub fn uncut<T>(write: impl FnOnce() -> T) -> T {
    let _held = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
    write()
}

/// Writes a file, and the folders it lies in. Errors: [`Error::File`]; a file that was there is then as it was.
pub fn write(path: &Path, content: &[u8]) -> Result<()> {
    let written = uncut(|| {
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        fs::create_dir_all(dir)?;
        let mut file = tempfile::Builder::new().prefix(".lowrank-").tempfile_in(dir)?;
        file.write_all(content)?;
        file.as_file().sync_all()?;
        file.persist(path).map(drop).map_err(|error| error.error)
    });
    written.map_err(|error| Error::File { path: path.into(), reason: format!("cannot be written: {error}") })
}
