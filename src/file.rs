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
    temporary: PathBuf,
}

impl Staged {
    /// Writes the bytes into the folder of `path`, under a name of their own. Errors: [`Error::File`].
    pub fn new(path: &Path, bytes: &[u8]) -> Result<Self> {
        Self::with(path, |file| file.write_all(bytes).map_err(|error| failed(path, &error)))
    }

    /// What `write` writes, piece by piece. Errors: [`Error::File`], and those of `write`.
    pub fn with(path: &Path, write: impl FnOnce(&mut File) -> Result<()>) -> Result<Self> {
        let (temporary, mut file) = create_beside(path).map_err(|error| failed(path, &error))?;
        let staged = Self { path: path.into(), temporary };
        write(&mut file)?;
        file.sync_all().map_err(|error| failed(path, &error))?;
        Ok(staged)
    }

    /// Gives the file its name, in place of what had it. Errors: [`Error::File`].
    pub fn publish(self) -> Result<()> {
        let renamed = fs::rename(&self.temporary, &self.path).and_then(|()| sync_folder(&self.path));
        renamed.map_err(|error| failed(&self.path, &error))
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        // After `publish` there is nothing under this name, and nobody to tell if there is and it cannot be removed.
        let _ = fs::remove_file(&self.temporary);
    }
}

/// A folder that is being filled and does not have its name yet. Dropped without [`publish`](Self::publish), it is gone.
#[derive(Debug)]
pub struct StagedFolder {
    path: PathBuf,
    temporary: PathBuf,
}

impl StagedFolder {
    /// An empty folder beside `path`. Errors: [`Error::File`], also if there is something under that name already.
    pub fn new(path: &Path) -> Result<Self> {
        if path.symlink_metadata().is_ok() {
            return Err(Error::File { path: path.into(), reason: "is there already".into() });
        }
        let made = beside(path, |temporary| fs::create_dir(temporary));
        let (temporary, ()) = made.map_err(|error| failed(path, &error))?;
        Ok(Self { path: path.into(), temporary })
    }

    /// Where to put the files. Each must be on the disk before the folder is published, as a published [`Staged`] is.
    pub fn inside(&self) -> &Path {
        &self.temporary
    }

    /// Gives the folder its name. Errors: [`Error::File`].
    pub fn publish(self) -> Result<()> {
        let renamed = fs::rename(&self.temporary, &self.path).and_then(|()| sync_folder(&self.path));
        renamed.map_err(|error| failed(&self.path, &error))
    }
}

impl Drop for StagedFolder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.temporary); // as for `Staged`
    }
}

/// A new file in the folder of `path`, which renaming therefore never has to copy.
fn create_beside(path: &Path) -> io::Result<(PathBuf, File)> {
    beside(path, |temporary| OpenOptions::new().write(true).create_new(true).open(temporary))
}

/// Makes something under a name that nothing in the folder of `path` has.
fn beside<T>(path: &Path, create: impl Fn(&Path) -> io::Result<T>) -> io::Result<(PathBuf, T)> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().ok_or_else(|| io::Error::new(ErrorKind::InvalidInput, "names no file"))?;
    loop {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let temporary = path.with_file_name(format!(".{}.{}-{number}", name.to_string_lossy(), std::process::id()));
        match create(&temporary) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => continue, // left by a process that was killed
            created => return created.map(|created| (temporary, created)),
        }
    }
}

/// Makes the renaming itself last, where folders can be synchronised.
fn sync_folder(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
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
