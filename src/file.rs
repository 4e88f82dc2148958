//! Files read with errors that name them, and written whole or not at all.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};

/// Writes a file so that nobody ever sees a part of it: under another name, to the disk, then renamed.
///
/// What was there before stays until the new file is complete. Errors: [`Error::File`].
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    Staged::new(path, bytes)?.publish()
}

/// The bytes of a file. Errors: [`Error::File`].
pub fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|error| failed(path, &error))
}

/// A file that is complete on the disk but does not have its name yet. Dropped without [`publish`](Self::publish), it is gone.
///
/// Files that belong together are all staged first and then published: only renaming is left to fail.
#[derive(Debug)]
pub struct Staged {
    path: PathBuf,
    temporary: Temporary,
}

impl Staged {
    /// Writes the bytes into the folder of `path`, under a name of their own. Errors: [`Error::File`].
    pub fn new(path: &Path, bytes: &[u8]) -> Result<Self> {
        Self::with(path, |file| file.write_all(bytes).map_err(|error| failed(path, &error)))
    }

    /// What `write` writes, piece by piece. Errors: [`Error::File`], and those of `write`.
    pub fn with(path: &Path, write: impl FnOnce(&mut File) -> Result<()>) -> Result<Self> {
        // A new file in the folder of `path`, which renaming therefore never has to copy.
        let create = |temporary: &Path| OpenOptions::new().write(true).create_new(true).open(temporary);
        let (temporary, mut file) = Temporary::beside(path, create).map_err(|error| failed(path, &error))?;
        let staged = Self { path: path.into(), temporary };
        write(&mut file)?;
        file.sync_all().map_err(|error| failed(path, &error))?;
        Ok(staged)
    }

    /// Gives the file its name, in place of what had it. Errors: [`Error::File`].
    pub fn publish(self) -> Result<()> {
        self.temporary.publish(&self.path)
    }
}

/// A folder that is being filled and does not have its name yet. Dropped without [`publish`](Self::publish), it is gone.
#[derive(Debug)]
pub struct StagedFolder {
    path: PathBuf,
    temporary: Temporary,
}

impl StagedFolder {
    /// An empty folder beside `path`. Errors: [`Error::File`], also if there is something under that name already.
    pub fn new(path: &Path) -> Result<Self> {
        if path.symlink_metadata().is_ok() {
            return Err(Error::File { path: path.into(), reason: "is there already".into() });
        }
        let made = Temporary::beside(path, |temporary| fs::create_dir(temporary));
        let (temporary, ()) = made.map_err(|error| failed(path, &error))?;
        Ok(Self { path: path.into(), temporary })
    }

    /// Where to put the files. Each must be on the disk before the folder is published, as a published [`Staged`] is.
    pub fn inside(&self) -> &Path {
        &self.temporary.path
    }

    /// Gives the folder its name. Errors: [`Error::File`].
    pub fn publish(self) -> Result<()> {
        self.temporary.publish(&self.path)
    }
}

/// A file or a folder that a run is filling: `.NAME.PID-N.lowrank`. Dropped, it is gone.
///
/// Its lock is held as long as this lives, and the system gives it back when the process ends, however it ends. So what nobody
/// holds was left by a process that was killed, and the next that writes into the folder removes it.
#[derive(Debug)]
struct Temporary {
    path: PathBuf,
    /// Holds the lock; `None` where there are no locks, and where nothing is removed therefore.
    _lock: Option<File>,
}

/// The end of the names of what is not complete.
const INCOMPLETE: &str = ".lowrank";

impl Temporary {
    /// Makes something under a name that nothing in the folder of `path` has, and removes what killed processes left there.
    fn beside<T>(path: &Path, create: impl Fn(&Path) -> io::Result<T>) -> io::Result<(Self, T)> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = path.file_name().ok_or_else(|| io::Error::new(ErrorKind::InvalidInput, "names no file"))?;
        remove_abandoned(folder_of(path));
        loop {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let name = format!(".{}.{}-{number}{INCOMPLETE}", name.to_string_lossy(), std::process::id());
            let temporary = path.with_file_name(name);
            match create(&temporary) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => continue, // by a process of the same number elsewhere
                Err(error) => return Err(error),
                Ok(created) => {
                    let lock = locked(&temporary);
                    // Between the two, another run may have taken it for abandoned.
                    if temporary.symlink_metadata().is_ok() {
                        return Ok((Self { path: temporary, _lock: lock }, created));
                    }
                }
            }
        }
    }

    fn publish(&self, path: &Path) -> Result<()> {
        let renamed = fs::rename(&self.path, path).and_then(|()| sync_folder(path));
        renamed.map_err(|error| failed(path, &error))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // After `publish` there is nothing under this name, and nobody to tell if there is and it cannot be removed.
        let _ = fs::remove_file(&self.path).or_else(|_| fs::remove_dir_all(&self.path));
    }
}

/// The lock of a file or a folder, if nobody holds it. Folders have locks on Unix alone.
fn locked(path: &Path) -> Option<File> {
    let file = File::open(path).ok().filter(|_| cfg!(unix))?;
    file.try_lock().is_ok().then_some(file)
}

/// Removes what processes that were killed left in a folder: what has such a name, and a lock that nobody holds.
fn remove_abandoned(folder: &Path) {
    let numbers = |text: &str| text.split_once('-').is_some_and(|(pid, n)| is_number(pid) && is_number(n));
    let incomplete = |name: &str| {
        let name = name.strip_prefix('.').and_then(|name| name.strip_suffix(INCOMPLETE));
        name.and_then(|name| name.rsplit_once('.')).is_some_and(|(_, end)| numbers(end))
    };
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let regular = entry.file_type().is_ok_and(|kind| kind.is_file() || kind.is_dir());
        if regular && entry.file_name().to_str().is_some_and(incomplete) {
            drop(locked(&entry.path()).map(|lock| Temporary { path: entry.path(), _lock: Some(lock) })); // which removes it
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

/// Makes the renaming itself last, where folders can be synchronised.
fn sync_folder(path: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(folder_of(path))?.sync_all() } else { Ok(()) }
}

pub(crate) fn failed(path: &Path, error: &io::Error) -> Error {
    Error::File { path: path.into(), reason: error.to_string() }
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
    fn what_is_staged_and_dropped_never_was() {
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
    fn a_file_that_cannot_have_its_name_leaves_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("taken");
        fs::create_dir_all(path.join("by a folder")).unwrap();
        assert!(matches!(write_whole(&path, b"new"), Err(Error::File { .. })));
        assert_eq!(names(folder.path()), ["taken"]);
    }
}
