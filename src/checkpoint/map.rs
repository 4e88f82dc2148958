//! Pieces of a file as slices: the one place where this crate maps memory.

use std::fs::File;
use std::io;

use memmap2::{Mmap, MmapOptions};

/// `len` bytes of a file from `start` on. Unmapped when dropped, so that what is read does not add up.
///
/// The file must be at least that long. Who shortens it meanwhile ends the process: the kernel has no other answer.
#[allow(unsafe_code, reason = "a mapped file is memory that others may change")]
pub(super) fn map(file: &File, start: u64, len: usize) -> io::Result<Mmap> {
    let mut options = MmapOptions::new();
    options.offset(start).len(len);
    // SAFETY: the mapping is private and read-only, and bytes have no invalid values. That nobody writes to the file while a
    // piece of it is mapped is what this crate asks of its caller, as every reader through a map must.
    unsafe { options.map(file) }
}

/// [`map`] with every page in place at once: for bytes that will all be read.
#[allow(unsafe_code, reason = "a mapped file is memory that others may change")]
pub(super) fn map_to_read(file: &File, start: u64, len: usize) -> io::Result<Mmap> {
    let mut options = MmapOptions::new();
    options.offset(start).len(len).populate();
    // SAFETY: as in `map`.
    unsafe { options.map(file) }
}
