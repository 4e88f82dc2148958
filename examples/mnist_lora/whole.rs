//! Writing files completely or not at all. Ctrl-C waits only for a file that is being written, which takes milliseconds.

use std::fs;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use lowrank::{Error, Result, file};

/// Locked while a file is being written.
static WRITING: Mutex<()> = Mutex::new(());

/// Makes Ctrl-C end the process between two writes, never during one.
pub fn guard_against_ctrl_c() -> Result<()> {
    let set = ctrlc::set_handler(|| {
        let _between_writes = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
        eprintln!();
        std::process::exit(130) // 128 + SIGINT, the convention of shells
    });
    set.map_err(|error| Error::Unavailable { backend: "Ctrl-C", reason: error.to_string() })
}

/// Runs a function that writes files; Ctrl-C waits until it returns.
pub fn uninterrupted<T>(write: impl FnOnce() -> T) -> T {
    let _held = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
    write()
}

/// Writes a file, and creates missing folders. Errors: [`Error::File`]; an existing file is unchanged then.
pub fn write(path: &Path, content: &[u8]) -> Result<()> {
    uninterrupted(|| {
        let dir = path.parent().unwrap_or(Path::new(""));
        fs::create_dir_all(dir).map_err(|error| Error::File { path: dir.into(), reason: error.to_string() })?;
        file::write_whole(path, content)
    })
}
