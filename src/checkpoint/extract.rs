//! `B·A ≈ W_tuned - W`: an adapter out of a base checkpoint and a tuned one.

use std::collections::BTreeMap;

use super::output::go_on;
use super::{Checkpoint, Entry, Shard, Watch, listed, number, refused};
use crate::adapter::{self, Factors, Folder, HostMatrix, Keep};
use crate::element::DType;
use crate::error::{Error, Result};

/// What to [`extract`].
#[derive(Debug)]
pub struct Extract<'e> {
    /// The model before it was tuned.
    pub base: &'e Checkpoint,
    /// The same model after.
    pub tuned: &'e Checkpoint,
    /// The rank, or the share of the change, of each module.
    pub keep: Keep,
    /// How the factors are stored.
    pub dtype: DType,
    /// Whether changed tensors that an adapter cannot hold, such as biases, norms and embeddings, are left as in the base.
    pub leave_others: bool,
}

/// An adapter of all weights that differ: of every two-dimensional tensor `x.weight`, embeddings aside, by truncated SVD.
///
/// Errors: [`Error::File`] if the checkpoints differ in names, shapes or types, if nothing differs, or if something does that
/// an adapter cannot hold; [`Error::Value`] for what [`Keep`] excludes; [`Error::Interrupted`].
pub fn extract(request: &Extract<'_>, watch: Watch<'_>) -> Result<Folder> {
    let Extract { base, tuned, keep, dtype, leave_others } = *request;
    base.is_plain_model()?;
    tuned.is_plain_model()?;
    let (mut modules, mut others) = (BTreeMap::new(), Vec::new());
    for entry in base.entries() {
        let Some((shard, _)) = base.find(&entry.name) else { continue };
        let (tuned, changed) = counterpart(tuned, entry)?;
        if differs((shard, entry), (tuned, changed))? {
            match (module(entry), &entry.shape[..], entry.float(), changed.float()) {
                (Some(name), &[n, k], Some(from), Some(to)) => {
                    let (w, tuned) = (matrix(shard, entry, [n, k], from)?, matrix(tuned, changed, [n, k], to)?);
                    let (a, b) = adapter::extract(&w, &tuned, keep).map_err(|error| inside(&entry.name, error))?;
                    modules.insert(name.to_string(), Factors { a, b, scaling: 1.0, dtype });
                }
                _ => others.push(entry.name.clone()),
            }
        }
        go_on(watch(entry.bytes as u64))?;
    }
    if !others.is_empty() && !leave_others {
        let reason = format!("{} differ from the base, and an adapter cannot hold them", listed(&others));
        return Err(refused(tuned.path(), reason));
    }
    if modules.is_empty() {
        return Err(refused(tuned.path(), "no weight differs from the base".into()));
    }
    Folder::new(None, modules)
}

/// The same tensor after tuning.
fn counterpart<'c>(tuned: &'c Checkpoint, entry: &Entry) -> Result<(&'c Shard, &'c Entry)> {
    let found = tuned.find(&entry.name);
    let (shard, changed) = found.ok_or_else(|| refused(tuned.path(), format!("has no `{}`, which the base has", entry.name)))?;
    if changed.shape != entry.shape {
        let (got, want) = (changed.dimensions(), entry.dimensions());
        return Err(shard.refused(format!("`{}` is {got}, want {want} as in the base", entry.name)));
    }
    Ok((shard, changed))
}

fn differs((base, entry): (&Shard, &Entry), (tuned, changed): (&Shard, &Entry)) -> Result<bool> {
    const PIECE: usize = 8 << 20;
    if entry.dtype != changed.dtype || entry.bytes != changed.bytes {
        return Ok(true);
    }
    for start in (0..entry.bytes).step_by(PIECE) {
        let len = PIECE.min(entry.bytes - start);
        if base.read(entry, start, len)?[..] != tuned.read(changed, start, len)?[..] {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The name of the module whose weight this is, unless it looks its rows up instead of multiplying with them.
fn module(entry: &Entry) -> Option<&str> {
    const EMBEDDINGS: [&str; 6] = ["embed_tokens", "embeddings", "wte", "wpe", "tok_embeddings", "shared"];
    let module = entry.name.strip_suffix(".weight")?;
    let embedding = module.split('.').any(|part| EMBEDDINGS.contains(&part) || part.ends_with("_embeddings"));
    (!embedding).then_some(module)
}

fn matrix(shard: &Shard, entry: &Entry, [n, k]: [usize; 2], dtype: DType) -> Result<HostMatrix> {
    let mut values = vec![0.0; n * k];
    number::widen(dtype, &shard.read(entry, 0, entry.bytes)?, &mut values);
    HostMatrix::new((n, k), values)
}

fn inside(name: &str, error: Error) -> Error {
    match error {
        Error::Value { verb, name: which, got, want } => {
            Error::Value { verb, name: which, got: format!("{got} in `{name}`"), want }
        }
        other => other,
    }
}
