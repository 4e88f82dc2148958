//! A file that only rank 0 has.

use std::path::Path;

use super::Communicator;
use crate::error::{Error, Result};
use crate::file;

/// The bytes of a file that rank 0 reads, on every rank. The other ranks need not have the file.
///
/// Errors: [`Error::Io`] on rank 0 if it cannot read the file; [`Error::File`] on the others then.
pub fn broadcast_file(path: &Path, comm: &impl Communicator) -> Result<Vec<u8>> {
    let read = if comm.rank() == 0 { file::read(path).map(Some) } else { Ok(None) };
    let mut length = match &read {
        Ok(bytes) => bytes.as_ref().map_or(0, Vec::len) as u64,
        Err(_) => u64::MAX, // every rank must hear of it, or it would wait for ever
    }
    .to_le_bytes();
    comm.broadcast(&mut length, 0)?;
    let mine = read?;
    let length = usize::try_from(u64::from_le_bytes(length)).ok().filter(|&length| length <= isize::MAX as usize);
    let Some(length) = length else {
        return Err(Error::File { path: path.into(), reason: "rank 0 could not read it".into() });
    };
    let mut bytes = mine.unwrap_or_else(|| vec![0; length]);
    comm.broadcast(&mut bytes, 0)?;
    Ok(bytes)
}
