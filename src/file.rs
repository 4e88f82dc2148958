//! Reads and writes whole files. Errors name the file; a file is written completely or not at all.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};

/// Writes a file atomically: under a temporary name, synchronised to the disk, then renamed.
///
/// An old file of this name stays until the new file is complete. Errors: [`Error::Io`].
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    Staged::new(path, bytes)?.publish()
}

/// Returns the bytes of a file. Errors: [`Error::Io`].
pub fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|error| failed(path, error))
}

/// A staged file: complete on the disk, under a temporary name. It is removed when dropped before [`publish`](Self::publish).
///
/// Files that belong together are all staged before the first is published, so that only renaming can still fail.
#[derive(Debug)]
pub struct Staged {
    path: PathBuf,
    temporary: Temporary,
}

impl Staged {
    /// Writes the bytes to a temporary file in the folder of `path`. Errors: [`Error::Io`].
    pub fn new(path: &Path, bytes: &[u8]) -> Result<Self> {
        Self::with(path, |file| file.write_all(bytes).map_err(|error| failed(path, error)))
    }

    /// Calls `write` to write a temporary file in the folder of `path`. Errors: [`Error::Io`], and those of `write`.
    pub fn with(path: &Path, write: impl FnOnce(&mut File) -> Result<()>) -> Result<Self> {
        // In the folder of `path`, and so on one file system: renaming copies nothing.
        let create = |temporary: &Path| OpenOptions::new().write(true).create_new(true).open(temporary);
        let (temporary, mut file) = Temporary::beside(path, create).map_err(|error| failed(path, error))?;
        let staged = Self { path: path.into(), temporary };
        write(&mut file)?;
        file.sync_all().map_err(|error| failed(path, error))?;
        Ok(staged)
    }

    /// Renames the file to `path`, and replaces an old file of this name. Errors: [`Error::Io`].
    pub fn publish(self) -> Result<()> {
        self.temporary.publish(&self.path)
    }
}

/// A staged folder, under a temporary name. It is removed with its files when dropped before [`publish`](Self::publish).
#[derive(Debug)]
pub struct StagedFolder {
    path: PathBuf,
    temporary: Temporary,
}

impl StagedFolder {
    /// Makes an empty folder beside `path`. Errors: [`Error::Io`]; [`Error::File`] if `path` exists.
    pub fn new(path: &Path) -> Result<Self> {
        if path.symlink_metadata().is_ok() {
            return Err(Error::File { path: path.into(), reason: "exists already".into() });
        }
        Self::beside(path)
    }

    /// Makes an empty folder beside `path`, which may exist, for what is to take its place. Errors: [`Error::Io`].
    pub fn beside(path: &Path) -> Result<Self> {
        let made = Temporary::beside(path, |temporary| fs::create_dir(temporary));
        let (temporary, ()) = made.map_err(|error| failed(path, error))?;
        Ok(Self { path: path.into(), temporary })
    }

    /// The path of the temporary folder. Each file in it must be synchronised to the disk before the folder is published, as a
    /// published [`Staged`] is.
    pub fn inside(&self) -> &Path {
        &self.temporary.path
    }

    /// Renames the folder to `path`. Errors: [`Error::Io`].
    pub fn publish(self) -> Result<()> {
        self.temporary.publish(&self.path)
    }
}

/// A temporary file or folder, `.NAME.PID-N.lowrank`. It is removed when dropped.
///
/// It is locked while it exists, and the system releases the lock when the process ends, even if it is killed. So an unlocked
/// one was left by a process that was killed, and the next process that writes into the folder removes it.
#[derive(Debug)]
struct Temporary {
    path: PathBuf,
    /// Holds the lock; `None` on systems without locks.
    _lock: Option<File>,
}

/// The extension of temporary files and folders.
const INCOMPLETE: &str = ".lowrank";

impl Temporary {
    /// Creates a file or folder under an unused name in the folder of `path`. First removes what killed processes left there.
    fn beside<T>(path: &Path, create: impl Fn(&Path) -> io::Result<T>) -> io::Result<(Self, T)> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = path.file_name().ok_or_else(|| io::Error::new(ErrorKind::InvalidInput, "names no file"))?;
        remove_abandoned(folder_of(path));
        loop {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let name = format!(".{}.{}-{number}{INCOMPLETE}", name.to_string_lossy(), std::process::id());
            let temporary = path.with_file_name(name);
            match create(&temporary) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => continue, // made by another machine
                Err(error) => return Err(error),
                Ok(created) => match lock(&temporary) {
                    // Another process may have taken it for abandoned before it was locked.
                    Lock::Taken => continue,
                    lock if temporary.symlink_metadata().is_ok() => {
                        return Ok((Self { path: temporary, _lock: lock.held() }, created));
                    }
                    _ => continue,
                },
            }
        }
    }

    /// Renames it to `path`.
    fn publish(&self, path: &Path) -> Result<()> {
        let renamed = fs::rename(&self.path, path).and_then(|()| sync_folder(path));
        renamed.map_err(|error| failed(path, error))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // After `publish` nothing has this name. A destructor cannot report an error.
        let _ = fs::remove_file(&self.path).or_else(|_| fs::remove_dir_all(&self.path));
    }
}

/// The result of trying to lock.
enum Lock {
    Held(File),
    /// Another process holds it.
    Taken,
    /// The file does not exist, or cannot be locked.
    Unavailable,
}

impl Lock {
    fn held(self) -> Option<File> {
        if let Lock::Held(file) = self { Some(file) } else { None }
    }
}

/// Tries to lock a file or a folder. Only on Unix, where folders can be locked too.
fn lock(path: &Path) -> Lock {
    let Some(file) = File::open(path).ok().filter(|_| cfg!(unix)) else { return Lock::Unavailable };
    match file.try_lock() {
        Ok(()) => Lock::Held(file),
        Err(TryLockError::WouldBlock) => Lock::Taken,
        Err(TryLockError::Error(_)) => Lock::Unavailable,
    }
}

/// Removes what killed processes left in a folder: everything with the name of a [`Temporary`] that is not locked.
fn remove_abandoned(folder: &Path) {
    let numbers = |text: &str| text.split_once('-').is_some_and(|(pid, n)| is_number(pid) && is_number(n));
    let incomplete = |name: &str| {
        let name = name.strip_prefix('.').and_then(|name| name.strip_suffix(INCOMPLETE));
        name.and_then(|name| name.rsplit_once('.')).is_some_and(|(_, end)| numbers(end))
    };
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let regular = entry.file_type().is_ok_and(|kind| kind.is_file() || kind.is_dir());
        if regular && entry.file_name().to_str().is_some_and(incomplete) {
            drop(lock(&entry.path()).held().map(|lock| Temporary { path: entry.path(), _lock: Some(lock) })); // drop removes it
        }
    }
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|digit| digit.is_ascii_digit())
}

/// The folder that a file lies in.
fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Synchronises the folder of `path`, so that a renaming in it is durable, on systems that can.
pub fn sync_folder(path: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(folder_of(path))?.sync_all() } else { Ok(()) }
}

/// An error about `from`, or a file in it, as one about `to`: the name that the caller knows.
pub fn renamed(error: Error, from: &Path, to: &Path) -> Error {
    let known = |path: PathBuf| match path.strip_prefix(from) {
        Ok(rest) if rest.as_os_str().is_empty() => to.into(),
        Ok(rest) => to.join(rest),
        Err(_) => path,
    };
    match error {
        Error::File { path, reason } => Error::File { path: known(path), reason },
        Error::Io { path, source } => Error::Io { path: known(path), source },
        other => other,
    }
}

/// [`Error::Io`] for a file.
pub(crate) fn failed(path: &Path, source: io::Error) -> Error {
    Error::Io { path: path.into(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_is_replaced_and_nothing_else_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report.json");
        write_whole(&path, b"old").unwrap();
        write_whole(&path, b"new").unwrap();
        assert_eq!(read(&path).unwrap(), b"new");
        assert_eq!(names(folder.path()), ["report.json"]);
    }

    #[test]
    fn a_staged_file_that_is_dropped_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report.json");
        write_whole(&path, b"old").unwrap();
        let staged = Staged::new(&path, b"new").unwrap();
        assert_eq!(names(folder.path()).len(), 2);
        drop(staged);
        assert_eq!(read(&path).unwrap(), b"old");
        assert_eq!(names(folder.path()), ["report.json"]);
    }

    #[test]
    fn a_folder_is_there_with_all_its_files_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        let staged = StagedFolder::new(&path).unwrap();
        write_whole(&staged.inside().join("shard"), b"new").unwrap();
        drop(staged);
        assert!(names(folder.path()).is_empty());

        let staged = StagedFolder::new(&path).unwrap();
        write_whole(&staged.inside().join("shard"), b"new").unwrap();
        assert!(!path.exists());
        staged.publish().unwrap();
        assert_eq!((names(folder.path()), names(&path)), (vec!["model".to_string()], vec!["shard".to_string()]));
        assert!(StagedFolder::new(&path).unwrap_err().to_string().contains("already"));
    }

    #[test]
    fn a_missing_folder_and_a_path_without_a_name_are_errors_that_name_them() {
        let folder = tempfile::tempdir().unwrap();
        for path in [folder.path().join("missing/report.json"), PathBuf::from("/")] {
            let error = write_whole(&path, b"new").unwrap_err();
            assert!(error.to_string().starts_with(path.to_str().unwrap()), "{error}");
        }
        assert!(names(folder.path()).is_empty());
    }

    #[test]
    fn a_file_that_cannot_be_renamed_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("taken");
        fs::create_dir_all(path.join("by a folder")).unwrap();
        assert!(matches!(write_whole(&path, b"new"), Err(Error::Io { .. })));
        assert_eq!(names(folder.path()), ["taken"]);
    }
}
