//! One file of a checkpoint: its header is in memory, and its tensors are read when they are needed.
//!
//! It is read and not mapped into memory: reading a map of a file that another process has shortened ends the program.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rayon::prelude::*;

use super::header::{Entry, Header, LONGEST_HEADER};
use super::refused;
use crate::adapter::convert_elements::{self, TASK};
use crate::error::{Error, Result};
use crate::file::failed;

/// One file of a checkpoint.
#[derive(Debug)]
pub(crate) struct Shard {
    pub(super) path: PathBuf,
    pub(super) header: Header,
    file: File,
    opened: State,
}

/// What changes when a file is written to: its length, and the time of the last change where the system knows it.
#[derive(Clone, Copy, Debug, PartialEq)]
struct State(u64, Option<SystemTime>);

impl State {
    fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self(metadata.len(), metadata.modified().ok()))
    }
}

impl Shard {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let opened = || {
            let mut file = File::open(path)?;
            let (opened, mut beginning) = (State::of(&file)?, Vec::new());
            file.by_ref().take(8).read_to_end(&mut beginning)?;
            let length = beginning.first_chunk().map_or(0, |&length| u64::from_le_bytes(length));
            file.by_ref().take(length.min(LONGEST_HEADER)).read_to_end(&mut beginning)?;
            Ok((file, opened, beginning))
        };
        let (file, opened, beginning) = opened().map_err(|error| failed(path, error))?;
        let header = Header::parse(path, &beginning, opened.0)?;
        Ok(Self { path: path.into(), header, file, opened })
    }

    /// A piece of a tensor. Errors: [`Error::File`], also if the file was changed since it was opened.
    pub(crate) fn read(&self, entry: &Entry, start: usize, bytes: usize) -> Result<Vec<u8>> {
        let mut piece = Vec::new();
        self.read_into(entry, start, bytes, &mut piece)?;
        Ok(piece)
    }

    /// [`read`](Self::read) into a buffer, which becomes as long as the piece.
    pub(super) fn read_into(&self, entry: &Entry, start: usize, bytes: usize, piece: &mut Vec<u8>) -> Result<()> {
        piece.resize(bytes, 0);
        self.fill(entry, start, piece)?;
        self.check_unchanged()
    }

    /// The elements from `first` on of a tensor of `f32`, `f16` or `bf16`, widened to `f32`, which is exact. Errors: those of
    /// [`read`](Self::read); [`Error::File`] for another type.
    pub(crate) fn widen(&self, entry: &Entry, first: usize, values: &mut [f32]) -> Result<()> {
        let other = || self.refused(format!("`{}` holds {:?}, want F32, F16 or BF16", entry.name, entry.dtype));
        let dtype = entry.float().ok_or_else(other)?;
        let pieces = values.par_chunks_mut(TASK).enumerate();
        pieces.try_for_each_init(Vec::new, |bytes, (at, values)| {
            bytes.resize(values.len() * dtype.size(), 0);
            self.fill(entry, (first + at * TASK) * dtype.size(), bytes)?;
            convert_elements::widen(dtype, bytes, values);
            Ok(())
        })?;
        self.check_unchanged()
    }

    /// All elements of a tensor, [widened](Self::widen).
    pub(crate) fn widened(&self, entry: &Entry) -> Result<Vec<f32>> {
        let mut values = vec![0.0; entry.elements()];
        self.widen(entry, 0, &mut values)?;
        Ok(values)
    }

    fn fill(&self, entry: &Entry, start: usize, bytes: &mut [u8]) -> Result<()> {
        read_at(&self.file, bytes, entry.start + start as u64).map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => self.changed(),
            _ => failed(&self.path, error),
        })
    }

    fn check_unchanged(&self) -> Result<()> {
        let now = State::of(&self.file).map_err(|error| failed(&self.path, error))?;
        if now == self.opened { Ok(()) } else { Err(self.changed()) }
    }

    fn changed(&self) -> Error {
        self.refused("was changed while it was being read; start again when nothing writes to it".into())
    }

    pub(super) fn refused(&self, reason: String) -> Error {
        refused(&self.path, reason)
    }
}

/// Fills the buffer with the bytes of the file from an offset on. Several threads may read at once.
fn read_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    #[cfg(unix)]
    return std::os::unix::fs::FileExt::read_exact_at(file, bytes, offset);
    #[cfg(windows)]
    return read_at_windows(file, bytes, offset);
    #[cfg(not(any(unix, windows)))]
    return Err(io::Error::new(ErrorKind::Unsupported, format!("reading {} bytes of {file:?} at {offset}", bytes.len())));
}

#[cfg(windows)]
fn read_at_windows(file: &File, mut bytes: &mut [u8], mut offset: u64) -> io::Result<()> {
    use std::os::windows::fs::FileExt;
    while !bytes.is_empty() {
        match file.seek_read(bytes, offset) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(read) => (bytes, offset) = (&mut bytes[read..], offset + read as u64),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
