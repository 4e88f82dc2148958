//! A new checkpoint on its way to the disk: under another name until all of it is there.

use std::fs::File;
use std::io::{self, Write};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use memmap2::Mmap;

use crate::error::{Error, Result};
use crate::file::{Staged, StagedFolder, failed};

/// How much is written before the disk is asked to begin with it.
const FLUSH: usize = 32 << 20;
/// How many pieces may wait: enough that neither side does, few enough that memory stays near one of them.
const WAITING: usize = 8;

/// Bytes on their way to the disk: made here, or as another file has them.
pub(super) enum Piece {
    Made(Vec<u8>),
    Mapped(Mmap),
}

impl Deref for Piece {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Piece::Made(bytes) => bytes,
            Piece::Mapped(bytes) => bytes,
        }
    }
}

/// A file that is written, and goes to the disk, while more of it is made: little is left to do at the end.
///
/// ```text
/// caller ─ pieces → writer ─ every 32 MiB → flusher
///        ←  spare ─
/// ```
pub(super) struct Output {
    path: PathBuf,
    pieces: SyncSender<Piece>,
    spare: Receiver<Vec<u8>>,
    writer: JoinHandle<io::Result<()>>,
}

impl Output {
    /// `path` is what errors call it.
    pub(super) fn new(path: &Path, file: &File) -> Result<Self> {
        let cloned = file.try_clone().and_then(|one| Ok((one, file.try_clone()?)));
        let (file, background) = cloned.map_err(|error| failed(path, error))?;
        let (pieces, to_write) = sync_channel(WAITING);
        let (used, spare) = sync_channel(WAITING);
        let writer = std::thread::spawn(move || write_all(file, background, to_write, used));
        Ok(Self { path: path.into(), pieces, spare, writer })
    }

    /// A buffer that was written and may be filled again, or a new one.
    pub(super) fn spare(&self) -> Vec<u8> {
        self.spare.try_recv().unwrap_or_default()
    }

    /// Errors: [`Error::File`] if the disk is known to have refused something.
    pub(super) fn write(&mut self, piece: Piece) -> Result<()> {
        // A writer that is gone has failed, and says at the end why.
        self.pieces.send(piece).map_err(|_| Error::File { path: self.path.clone(), reason: "cannot be written".into() })
    }

    /// Waits for the writer. What the flusher was not asked for is still to be synchronised.
    pub(super) fn finish(self, made: Result<()>) -> Result<()> {
        drop(self.pieces);
        let written = self.writer.join().unwrap_or_else(|_| Err(io::Error::other("the writer died")));
        written.map_err(|error| failed(&self.path, error)).and(made)
    }
}

/// The writer, and its flusher.
fn write_all(mut file: File, background: File, pieces: Receiver<Piece>, used: SyncSender<Vec<u8>>) -> io::Result<()> {
    let (flush, asked) = sync_channel(1);
    let flusher = std::thread::spawn(move || asked.into_iter().try_for_each(|()| background.sync_data()));
    let mut unflushed = 0;
    for piece in pieces {
        file.write_all(&piece)?;
        unflushed += piece.len();
        // A flusher that is still busy is not asked again.
        if unflushed >= FLUSH && flush.try_send(()).is_ok() {
            unflushed = 0;
        }
        if let Piece::Made(buffer) = piece {
            let _ = used.try_send(buffer); // one too many is freed
        }
    }
    drop(flush);
    flusher.join().unwrap_or_else(|_| Err(io::Error::other("the flusher died")))
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

/// `Err` if the caller asked to stop.
pub(super) fn go_on(flow: std::ops::ControlFlow<()>) -> Result<()> {
    if flow.is_break() { Err(Error::Interrupted) } else { Ok(()) }
}
