//! Memory-mapping pieces of a file.

use std::fs::File;
use std::io;

use memmap2::{Mmap, MmapOptions};

/// Maps `len` bytes of a file from `start` on; dropping the result unmaps them.
///
/// The file must be at least that long. If another process shortens it while it is mapped, reading ends this process with SIGBUS.
#[allow(unsafe_code, reason = "a mapped file is memory that others may change")]
pub(super) fn map(file: &File, start: u64, len: usize) -> io::Result<Mmap> {
    let mut options = MmapOptions::new();
    options.offset(start).len(len);
    // SAFETY: the mapping is private and read-only, and bytes have no invalid values. The caller must not let the file be changed while a
    // piece of it is mapped; `Checkpoint` documents this.
    unsafe { options.map(file) }
}

/// [`map`], with all pages read in advance: for bytes that will all be used.
#[allow(unsafe_code, reason = "a mapped file is memory that others may change")]
pub(super) fn map_to_read(file: &File, start: u64, len: usize) -> io::Result<Mmap> {
    let mut options = MmapOptions::new();
    options.offset(start).len(len).populate();
    // SAFETY: as in `map`.
    unsafe { options.map(file) }
}
