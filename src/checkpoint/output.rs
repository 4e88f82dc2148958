//! Writing a new checkpoint to the disk, under a temporary name until it is complete.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use crate::error::{Error, Result};
use crate::file::{Staged, StagedFolder, failed};

/// Bytes that are written between two calls of `fdatasync`.
const FLUSH: usize = 32 << 20;
/// Capacity of the queue of pieces: enough that neither side waits, and small enough to bound memory.
const WAITING: usize = 8;

/// A file that is written and synchronised by background threads while the next pieces are computed.
///
/// ```text
/// caller ─ pieces → writer ─ every 32 MiB → flusher
///        ←  spare ─
/// ```
pub(super) struct Output {
    path: PathBuf,
    pieces: SyncSender<Vec<u8>>,
    spare: Receiver<Vec<u8>>,
    writer: JoinHandle<io::Result<()>>,
}

impl Output {
    /// Starts the threads that write to `file`. Errors name the file `path`.
    pub(super) fn new(path: &Path, file: &File) -> Result<Self> {
        let cloned = file.try_clone().and_then(|one| Ok((one, file.try_clone()?)));
        let (file, background) = cloned.map_err(|error| failed(path, error))?;
        let (pieces, to_write) = sync_channel(WAITING);
        let (used, spare) = sync_channel(WAITING);
        let writer = std::thread::spawn(move || write_all(file, background, to_write, used));
        Ok(Self { path: path.into(), pieces, spare, writer })
    }

    /// A buffer that has been written and can be reused, or an empty one.
    pub(super) fn spare(&self) -> Vec<u8> {
        self.spare.try_recv().unwrap_or_default()
    }

    /// Queues a piece. Errors: [`Error::File`] if an earlier write has failed.
    pub(super) fn write(&mut self, piece: Vec<u8>) -> Result<()> {
        // If the writer has ended, it has failed; `finish` returns its error.
        self.pieces.send(piece).map_err(|_| Error::File { path: self.path.clone(), reason: "cannot be written".into() })
    }

    /// Waits for the writer. The caller must still synchronise the file, as the last pieces may not be on the disk.
    pub(super) fn finish(self, made: Result<()>) -> Result<()> {
        drop(self.pieces);
        let written = self.writer.join().unwrap_or_else(|_| Err(io::Error::other("the writer died")));
        written.map_err(|error| failed(&self.path, error)).and(made)
    }
}

/// The writer thread, which starts the flusher.
fn write_all(mut file: File, background: File, pieces: Receiver<Vec<u8>>, used: SyncSender<Vec<u8>>) -> io::Result<()> {
    let (flush, asked) = sync_channel(1);
    let flusher = std::thread::spawn(move || asked.into_iter().try_for_each(|()| background.sync_data()));
    let mut unflushed = 0;
    for piece in pieces {
        file.write_all(&piece)?;
        unflushed += piece.len();
        // If the flusher is still busy, this piece is left to the next call.
        if unflushed >= FLUSH && flush.try_send(()).is_ok() {
            unflushed = 0;
        }
        let _ = used.try_send(piece); // if the queue is full, the buffer is freed
    }
    drop(flush);
    flusher.join().unwrap_or_else(|_| Err(io::Error::other("the flusher died")))
}

/// A checkpoint that is complete on the disk but does not have its final name yet. Dropping it deletes it.
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

/// Errors: [`Error::Interrupted`] if the caller's `watch` returned `Break`.
pub(super) fn check_interrupted(flow: std::ops::ControlFlow<()>) -> Result<()> {
    if flow.is_break() { Err(Error::Interrupted) } else { Ok(()) }
}
