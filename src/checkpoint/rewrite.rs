//! The same checkpoint with some tensors changed: streamed a piece at a time, whole or not at all.

use std::path::Path;

use super::companions::copy_companions;
use super::header::Entry;
use super::model::ConfigEdit;
use super::output::{Output, Piece, StagedCheckpoint, go_on};
use super::{Checkpoint, Shard, Watch, convert_elements, refused};
use crate::element::DType;
use crate::error::Result;
use crate::file::{self, Staged, StagedFolder};

/// Bytes that are mapped at once.
const PIECE: usize = 4 << 20;

/// What becomes of each tensor.
pub(super) trait Edit {
    /// How it will be stored.
    fn stored(&self, entry: &Entry) -> Entry;
    /// The tensors that take its place, in the order in which [`write`](Self::write) writes them: itself, unless a format has several for
    /// a weight.
    fn parts(&self, entry: &Entry) -> Result<Vec<Entry>> {
        Ok(vec![self.stored(entry)])
    }
    /// Tensors that come after all others.
    fn added(&self) -> &[Entry] {
        &[]
    }
    /// What the model's config is to say.
    fn config(&self) -> ConfigEdit;
    /// A folder whose tokenizer the new model has.
    fn companions(&self) -> Option<&Path> {
        None
    }
    /// Writes its new bytes, as many as [`stored`](Self::stored) says.
    fn write(&mut self, shard: &Shard, entry: &Entry, pass: &mut Pass<'_, '_>) -> Result<()>;
}

/// One pass over a file: where the new bytes go, and who watches.
pub(super) struct Pass<'p, 'w> {
    output: &'p mut Output,
    watch: &'p mut Watch<'w>,
}

impl Pass<'_, '_> {
    pub(super) fn write(&mut self, bytes: Vec<u8>) -> Result<()> {
        self.output.write(Piece::Made(bytes))
    }

    /// A buffer of this length for [`write`](Self::write), whatever it holds.
    pub(super) fn buffer(&self, len: usize) -> Vec<u8> {
        let mut buffer = self.output.spare();
        buffer.resize(len, 0);
        buffer
    }

    /// So many bytes of the old checkpoint are done.
    pub(super) fn done(&mut self, bytes: usize) -> Result<()> {
        go_on((self.watch)(bytes as u64))
    }

    /// The bytes as they are.
    pub(super) fn copy(&mut self, shard: &Shard, entry: &Entry) -> Result<()> {
        for start in (0..entry.bytes).step_by(PIECE) {
            let piece = shard.read(entry, start, PIECE.min(entry.bytes - start))?;
            let bytes = piece.len();
            self.output.write(Piece::Mapped(piece))?;
            self.done(bytes)?;
        }
        Ok(())
    }

    /// Every element rounded. Errors: [`File`](crate::Error::File) if a finite number is more than the new type can hold.
    pub(super) fn convert(&mut self, shard: &Shard, entry: &Entry, [from, to]: [DType; 2]) -> Result<()> {
        const ELEMENTS: usize = PIECE / 4;
        let mut wide = vec![0.0; ELEMENTS];
        let total = entry.elements();
        for start in (0..total).step_by(ELEMENTS) {
            let len = ELEMENTS.min(total - start);
            let piece = shard.read(entry, start * from.size(), len * from.size())?;
            let (wide, mut narrow) = (&mut wide[..len], self.buffer(len * to.size()));
            convert_elements::widen(from, &piece, wide);
            if !convert_elements::narrow(to, wide, &mut narrow)
                && let Some(value) = overflowing(to, wide, &narrow)
            {
                return Err(refused(&shard.path, format!("`{}` holds {value}, more than {to} can", entry.name)));
            }
            self.write(narrow)?;
            self.done(piece.len())?;
        }
        Ok(())
    }
}

/// A finite number that did not stay so.
fn overflowing(dtype: DType, values: &[f32], bytes: &[u8]) -> Option<f32> {
    let mut back = vec![0.0; values.len()];
    convert_elements::widen(dtype, bytes, &mut back);
    let mut pairs = values.iter().zip(&back);
    pairs.find(|(value, back)| value.is_finite() && !back.is_finite()).map(|(value, _)| *value)
}

/// Writes the edited checkpoint beside `out`: a file if it was opened as one, else a folder with all that lies beside it. Beside
/// it, what there is to tell of that.
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
    for (at, shard) in base.shards.iter().enumerate() {
        let name = shard.path.file_name().unwrap_or_default();
        rewrite_shard((shard, at + 1 == base.shards.len()), &staged.inside().join(name), edit, watch)?.publish()?;
    }
    if let Some(index) = &base.index {
        let name = index.file_name().unwrap_or_default();
        file::write_whole(&staged.inside().join(name), &index_of(base, index, edit)?)?;
    }
    let notes = copy_companions(base, staged.inside(), &edit.config(), edit.companions())?;
    Ok((StagedCheckpoint::Folder(staged), notes))
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
    go_on(watch(0))?; // synchronising takes a while: the caller may have changed their mind
    Ok(staged)
}

/// The index, with the bytes of all tensors as they are now, and with those that are new.
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
