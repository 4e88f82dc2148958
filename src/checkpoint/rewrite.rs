//! Writing a copy of a checkpoint with some tensors changed: streamed one piece at a time, completely or not at all.

use std::path::Path;

use super::companions::copy_companions;
use super::header::Entry;
use super::model::ConfigEdit;
use super::output::{Output, StagedCheckpoint, check_interrupted};
use super::shard::Shard;
use super::{Checkpoint, Watch, refused};
use crate::adapter::convert_elements;
use crate::element::DType;
use crate::error::Result;
use crate::file::{self, Staged, StagedFolder};

/// Bytes that are read at a time.
const PIECE: usize = 4 << 20;

/// The changes of a checkpoint.
pub(super) trait Edit {
    /// The entry of a tensor after the change.
    fn stored(&self, entry: &Entry) -> Entry;
    /// The tensors that take its place, in the order in which [`write`](Self::write) writes them: itself, unless a format has several for
    /// a weight.
    fn parts(&self, entry: &Entry) -> Result<Vec<Entry>> {
        Ok(vec![self.stored(entry)])
    }
    /// New tensors, which are stored after all others.
    fn added(&self) -> &[Entry] {
        &[]
    }
    /// The edits of the model's config.
    fn config(&self) -> ConfigEdit;
    /// A folder whose tokenizer replaces that of the model.
    fn companions(&self) -> Option<&Path> {
        None
    }
    /// Writes the new bytes of a tensor, with the size that [`stored`](Self::stored) returns.
    fn write(&mut self, shard: &Shard, entry: &Entry, pass: &mut Pass<'_, '_>) -> Result<()>;
}

/// One pass over a file: the output, and the caller's watch.
pub(super) struct Pass<'p, 'w> {
    output: &'p mut Output,
    watch: &'p mut Watch<'w>,
}

impl Pass<'_, '_> {
    pub(super) fn write(&mut self, bytes: Vec<u8>) -> Result<()> {
        self.output.write(bytes)
    }

    /// A buffer of this length, with arbitrary content, for [`write`](Self::write).
    pub(super) fn buffer(&self, len: usize) -> Vec<u8> {
        let mut buffer = self.output.spare();
        buffer.resize(len, 0);
        buffer
    }

    /// Reports that this many more bytes of the old checkpoint are done. Errors: [`Interrupted`](crate::Error::Interrupted).
    pub(super) fn done(&mut self, bytes: usize) -> Result<()> {
        check_interrupted((self.watch)(bytes as u64))
    }

    /// Copies the bytes of a tensor.
    pub(super) fn copy(&mut self, shard: &Shard, entry: &Entry) -> Result<()> {
        for start in (0..entry.bytes).step_by(PIECE) {
            let (bytes, mut piece) = (PIECE.min(entry.bytes - start), self.output.spare());
            shard.read_into(entry, start, bytes, &mut piece)?;
            self.write(piece)?;
            self.done(bytes)?;
        }
        Ok(())
    }

    /// Converts the elements of a tensor, rounded to the nearest. Errors: [`File`](crate::Error::File) if a finite element
    /// overflows.
    pub(super) fn convert(&mut self, shard: &Shard, entry: &Entry, [from, to]: [DType; 2]) -> Result<()> {
        const ELEMENTS: usize = PIECE / 4;
        let mut widened = vec![0.0; ELEMENTS];
        let total = entry.elements();
        for start in (0..total).step_by(ELEMENTS) {
            let len = ELEMENTS.min(total - start);
            let (widened, mut rounded) = (&mut widened[..len], self.buffer(len * to.size()));
            shard.widen(entry, start, widened)?;
            if !convert_elements::round(to, widened, &mut rounded)
                && let Some(value) = convert_elements::overflowing(to, widened, &rounded)
            {
                return Err(refused(&shard.path, format!("`{}` holds {value}, more than {to} can", entry.name)));
            }
            self.write(rounded)?;
            self.done(len * from.size())?;
        }
        Ok(())
    }
}

/// Stages the edited checkpoint: a file if the base was opened as one, else a folder, with copies of the other files. Returns it
/// with notes about these files.
pub(super) fn rewrite(
    base: &Checkpoint,
    out: &Path,
    edit: &mut impl Edit,
    watch: &mut Watch<'_>,
) -> Result<(StagedCheckpoint, Vec<String>)> {
    let (true, false) = (base.is_folder(), base.shards.is_empty()) else {
        let shard = base.shards.first().ok_or_else(|| refused(&base.path, "holds no file".into()))?;
        return Ok((StagedCheckpoint::File(rewrite_shard((shard, true), out, edit, watch)?), Vec::new()));
    };
    let staged = StagedFolder::new(out)?;
    let notes = write_folder(base, staged.inside(), edit, watch);
    let notes = notes.map_err(|error| file::renamed(error, staged.inside(), out))?;
    Ok((StagedCheckpoint::Folder(staged), notes))
}

fn write_folder(base: &Checkpoint, folder: &Path, edit: &mut impl Edit, watch: &mut Watch<'_>) -> Result<Vec<String>> {
    for (at, shard) in base.shards.iter().enumerate() {
        let name = shard.path.file_name().unwrap_or_default();
        rewrite_shard((shard, at + 1 == base.shards.len()), &folder.join(name), edit, watch)?.publish()?;
    }
    if let Some(index) = &base.index {
        let name = index.file_name().unwrap_or_default();
        file::write_whole(&folder.join(name), &index_of(base, index, edit)?)?;
    }
    copy_companions(base, folder, &edit.config(), edit.companions())
}

fn rewrite_shard((shard, last): (&Shard, bool), out: &Path, edit: &mut impl Edit, watch: &mut Watch<'_>) -> Result<Staged> {
    let added = if last { edit.added().to_vec() } else { Vec::new() };
    let stored: Vec<Vec<Entry>> =
        shard.header.entries.iter().chain(&added).map(|entry| edit.parts(entry)).collect::<Result<_>>()?;
    let stored = stored.concat();
    let header = shard.header.with_entries(&shard.path, &stored)?;
    let staged = Staged::with(out, |file| {
        let mut output = Output::new(out, file)?;
        let mut pass = Pass { output: &mut output, watch };
        let made = pass.write(header);
        let mut entries = shard.header.entries.iter().chain(&added);
        let made = made.and_then(|()| entries.try_for_each(|entry| edit.write(shard, entry, &mut pass)));
        output.finish(made)
    })?;
    check_interrupted(watch(0))?; // synchronising takes a while, so ask the caller again
    Ok(staged)
}

/// The bytes of the index, with the new total size and the new tensors.
fn index_of(base: &Checkpoint, path: &Path, edit: &impl Edit) -> Result<Vec<u8>> {
    let parts: Vec<Vec<Entry>> = base.entries().map(|entry| edit.parts(entry)).collect::<Result<_>>()?;
    let total: usize = parts.iter().flatten().map(|entry| entry.bytes).sum::<usize>()
        + edit.added().iter().map(|entry| edit.stored(entry).bytes).sum::<usize>();
    let bytes = file::read(path)?;
    let parsed: Result<serde_json::Value, _> = serde_json::from_slice(&bytes);
    let mut document = parsed.map_err(|error| refused(path, error.to_string()))?;
    let mut changed = false;
    if let Some(size) = document.pointer_mut("/metadata/total_size").filter(|size| size.as_u64() != Some(total as u64)) {
        (*size, changed) = (total.into(), true);
    }
    let last = base.shards.last().and_then(|shard| shard.path.file_name()).map(|name| name.to_string_lossy());
    if let (Some(map), Some(last)) = (document.pointer_mut("/weight_map").and_then(serde_json::Value::as_object_mut), last) {
        for (entry, parts) in base.entries().zip(&parts) {
            if let [part] = &parts[..]
                && part.name == entry.name
            {
                continue;
            }
            let Some(file) = map.shift_remove(&entry.name) else { continue };
            parts.iter().for_each(|part| drop(map.insert(part.name.clone(), file.clone())));
            changed = true;
        }
        for entry in edit.added() {
            map.insert(entry.name.clone(), last.as_ref().into());
            changed = true;
        }
    }
    Ok(if changed { format!("{document:#}\n").into_bytes() } else { bytes })
}
