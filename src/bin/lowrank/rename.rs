//! Renaming that never replaces what it was not told to, and never leaves a name without a file.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

/// Renames a file or a folder to a name that is free. Errors: [`ErrorKind::AlreadyExists`] if it is not, even if another process
/// took it a moment ago.
pub(crate) fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    at_once::rename_new(from, to).unwrap_or_else(|| rename_new_in_steps(from, to))
}

/// Exchanges the names of two files or folders. Where the system cannot exchange names at once, what was at `to` is called
/// `NAME.old` meanwhile, and stays there if the process is killed.
pub(crate) fn exchange(from: &Path, to: &Path) -> io::Result<()> {
    at_once::exchange(from, to).unwrap_or_else(|| exchange_in_steps(from, to))
}

/// By one call of the system; `None` if the system or the file system has no such call.
mod at_once {
    use super::*;

    #[cfg(any(target_os = "linux", target_os = "macos"))]
    fn renamed(from: &Path, to: &Path, flags: rustix::fs::RenameFlags) -> Option<io::Result<()>> {
        use rustix::{fs::CWD, io::Errno};
        match rustix::fs::renameat_with(CWD, from, CWD, to, flags) {
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => None,
            renamed => Some(renamed.map_err(io::Error::from)),
        }
    }

    #[cfg(any(target_os = "linux", target_os = "macos"))]
    pub(super) fn rename_new(from: &Path, to: &Path) -> Option<io::Result<()>> {
        renamed(from, to, rustix::fs::RenameFlags::NOREPLACE)
    }

    #[cfg(any(target_os = "linux", target_os = "macos"))]
    pub(super) fn exchange(from: &Path, to: &Path) -> Option<io::Result<()>> {
        renamed(from, to, rustix::fs::RenameFlags::EXCHANGE)
    }

    #[cfg(not(any(target_os = "linux", target_os = "macos")))]
    pub(super) fn rename_new(_: &Path, _: &Path) -> Option<io::Result<()>> {
        None
    }

    #[cfg(not(any(target_os = "linux", target_os = "macos")))]
    pub(super) fn exchange(_: &Path, _: &Path) -> Option<io::Result<()>> {
        None
    }
}

fn rename_new_in_steps(from: &Path, to: &Path) -> io::Result<()> {
    if from.is_file() {
        match fs::hard_link(from, to) {
            Ok(()) => return fs::remove_file(from),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => return Err(error),
            Err(_) => {} // a file system without hard links
        }
    }
    if to.symlink_metadata().is_ok() {
        return Err(ErrorKind::AlreadyExists.into());
    }
    fs::rename(from, to)
}

fn exchange_in_steps(from: &Path, to: &Path) -> io::Result<()> {
    let mut old = to.file_name().unwrap_or_default().to_os_string();
    old.push(".old");
    let old: PathBuf = to.with_file_name(old);
    rename_new_in_steps(to, &old)?;
    if let Err(error) = fs::rename(from, to) {
        fs::rename(&old, to)?;
        return Err(error);
    }
    fs::rename(&old, from)
}

#[cfg(test)]
mod tests {
    use super::*;

    type Rename = fn(&Path, &Path) -> io::Result<()>;

    /// Makes a file and a folder, each with the text `new`, and for each another with the text `old`.
    fn pairs(desk: &Path) -> [[PathBuf; 2]; 2] {
        let [file, folder] = [["new", "old"], ["new folder", "old folder"]].map(|names| names.map(|name| desk.join(name)));
        for (path, text) in file.iter().zip(["new", "old"]) {
            fs::write(path, text).unwrap();
        }
        for (path, text) in folder.iter().zip(["new", "old"]) {
            fs::create_dir(path).unwrap();
            fs::write(path.join("text"), text).unwrap();
        }
        [file, folder]
    }

    fn text(path: &Path) -> String {
        fs::read_to_string(if path.is_dir() { path.join("text") } else { path.into() }).unwrap()
    }

    #[test]
    fn a_name_that_is_taken_is_left_alone() {
        for rename in [rename_new as Rename, rename_new_in_steps] {
            let desk = tempfile::tempdir().unwrap();
            for [new, old] in pairs(desk.path()) {
                assert_eq!(rename(&new, &old).unwrap_err().kind(), ErrorKind::AlreadyExists);
                assert_eq!([text(&new), text(&old)], ["new", "old"]);
                let free = desk.path().join("free");
                rename(&new, &free).unwrap();
                assert_eq!(text(&free), "new");
                assert!(!new.exists());
                let _ = fs::remove_file(&free).or_else(|_| fs::remove_dir_all(&free));
            }
        }
    }

    #[test]
    fn names_are_exchanged() {
        for exchange in [exchange as Rename, exchange_in_steps] {
            let desk = tempfile::tempdir().unwrap();
            for [new, old] in pairs(desk.path()) {
                exchange(&new, &old).unwrap();
                assert_eq!([text(&new), text(&old)], ["old", "new"]);
            }
            assert_eq!(fs::read_dir(desk.path()).unwrap().count(), 4);
        }
    }

    #[test]
    fn what_cannot_be_replaced_keeps_its_name() {
        let desk = tempfile::tempdir().unwrap();
        let [[_, old], _] = pairs(desk.path());
        for exchange in [exchange as Rename, exchange_in_steps] {
            assert!(exchange(&desk.path().join("missing"), &old).is_err());
            assert_eq!(text(&old), "old");
        }
    }
}
