//! Files are written whole or not at all, and Ctrl-C leaves nothing behind: it waits for a file to be written, which takes
//! milliseconds, and for nothing else.

use std::fs;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use lowrank::{Error, Result, file};

/// Held while something is being written.
static WRITING: Mutex<()> = Mutex::new(());

/// Makes Ctrl-C end the process between two writes, never in one.
pub fn guard_against_ctrl_c() -> Result<()> {
    let set = ctrlc::set_handler(|| {
        let _between_writes = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
        eprintln!();
        std::process::exit(130) // 128 + SIGINT, as shells have it
    });
    set.map_err(|error| Error::Unavailable { backend: "Ctrl-C", reason: error.to_string() })
}

/// Runs what writes files, and is not to be cut off by Ctrl-C.
pub fn uncut<T>(write: impl FnOnce() -> T) -> T {
    let _held = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
    write()
}

/// Writes a file, and the folders it lies in. Errors: [`Error::File`]; a file that was there is then as it was.
pub fn write(path: &Path, content: &[u8]) -> Result<()> {
    uncut(|| {
        let dir = path.parent().unwrap_or(Path::new(""));
        fs::create_dir_all(dir).map_err(|error| Error::File { path: dir.into(), reason: error.to_string() })?;
        file::write_whole(path, content)
    })
}
