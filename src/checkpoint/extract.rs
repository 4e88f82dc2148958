//! `B·A ≈ W_tuned - W`: an adapter out of a base checkpoint and a tuned one.

use std::collections::BTreeMap;

use super::layout::{self, Layout};
use super::model::ModelConfig;
use super::names::Place;
use super::output::go_on;
use super::{Checkpoint, Entry, Watch, convert_elements, listed, refused};
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
    /// How linear layers are stored, where the config does not tell.
    pub layout: Option<Layout>,
}

/// What [`extract`] makes.
#[derive(Clone, Debug)]
pub struct Extracted {
    /// The adapter.
    pub adapter: Folder,
    /// What of the tuned model is not in it, a sentence for each reason.
    pub left: Vec<String>,
}

/// An adapter of all weights that differ: of every two-dimensional tensor `x.weight`, embeddings aside, by truncated SVD.
///
/// Numbers are compared by value, whatever type they are stored in. Weights that the model stores `k×n` (GPT-2) give factors of the
/// layer, and `fan_in_fan_out`.
///
/// Errors: [`Error::File`] if nothing differs, if something does that an adapter cannot hold, such as a tensor that only one of the
/// two has, or if nothing tells how a layer is stored; [`Error::Value`] for what [`Keep`] excludes; [`Error::Interrupted`].
pub fn extract(request: &Extract<'_>, watch: Watch<'_>) -> Result<Extracted> {
    let Extract { base, tuned, keep, dtype, leave_others, layout } = *request;
    base.is_plain_model()?;
    tuned.is_plain_model()?;
    let config = base.beside().and_then(ModelConfig::read);
    let (mut modules, mut others, mut in_out) = (BTreeMap::new(), Others::default(), false);
    for entry in base.entries() {
        let Some(place) = base.find(&entry.name) else { continue };
        match tuned.find(&entry.name) {
            None => others.gone.push(entry.name.clone()),
            Some((_, changed)) if changed.shape != entry.shape => {
                others.resized.push(format!("{} ({}, not {})", entry.name, changed.dimensions(), entry.dimensions()));
            }
            Some(changed) if differs(place, changed)? => match (module(entry), &entry.shape[..]) {
                (Some(name), &[_, _]) if entry.float().is_some() && changed.1.float().is_some() => {
                    let transposed = stored(config.as_ref(), layout, name).ok_or_else(|| {
                        let what = "is named as in GPT-2, and no config.json tells whether it is stored out × in or in × out";
                        refused(base.path(), format!("`{}` {what}; say it with --layout", entry.name))
                    })? == Layout::InOut;
                    let matrix = |place| matrix(place).map(|w| if transposed { w.transposed() } else { w });
                    let factors = adapter::extract(&matrix(place)?, &matrix(changed)?, keep);
                    let (a, b) = factors.map_err(|error| inside(&entry.name, error))?;
                    in_out |= transposed;
                    modules.insert(name.to_string(), Factors { a, b, scaling: 1.0, dtype });
                }
                _ => others.changed.push(entry.name.clone()),
            },
            Some(_) => {}
        }
        go_on(watch(entry.bytes as u64))?;
    }
    others.new = tuned.entries().filter(|entry| base.find(&entry.name).is_none()).map(|entry| entry.name.clone()).collect();
    let left = others.told(|names| names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", "));
    if !left.is_empty() && !leave_others {
        let left = others.told(listed);
        return Err(refused(tuned.path(), format!("{}; an adapter cannot hold that: --leave-others leaves it", left.join("; "))));
    }
    if modules.is_empty() {
        return Err(refused(tuned.path(), "no weight differs from the base".into()));
    }
    let adapter = Folder::new(None, modules)?;
    Ok(Extracted { adapter: if in_out { adapter.stored_in_out()? } else { adapter }, left })
}

/// What differs and is no weight of a module.
#[derive(Default)]
struct Others {
    changed: Vec<String>,
    resized: Vec<String>,
    gone: Vec<String>,
    new: Vec<String>,
}

impl Others {
    fn told(&self, names: impl Fn(&[String]) -> String) -> Vec<String> {
        let kinds = [
            (&self.changed, "other numbers than in the base"),
            (&self.resized, "another shape than in the base"),
            (&self.gone, "only in the base"),
            (&self.new, "only in the tuned model"),
        ];
        let told = kinds.iter().filter(|(kind, _)| !kind.is_empty());
        told.map(|(kind, what)| format!("{what}: {}", names(kind))).collect()
    }
}

/// How a module is stored; `None` if nothing tells.
fn stored(config: Option<&ModelConfig>, asked: Option<Layout>, module: &str) -> Option<Layout> {
    let usual = (!layout::is_conv1d(module)).then_some(Layout::OutIn);
    layout::told(config, module).or(asked).or(usual)
}

/// Whether two tensors of one shape hold other numbers, whatever their types.
fn differs((base, entry): Place<'_>, (tuned, changed): Place<'_>) -> Result<bool> {
    const PIECE: usize = 1 << 21;
    match (entry.float(), changed.float()) {
        (Some(one), Some(other)) if one != other => {
            let total = entry.elements();
            for start in (0..total).step_by(PIECE) {
                let len = PIECE.min(total - start);
                let [mut before, mut after] = [vec![0.0; len], vec![0.0; len]];
                convert_elements::widen(one, &base.read(entry, start * one.size(), len * one.size())?, &mut before);
                convert_elements::widen(other, &tuned.read(changed, start * other.size(), len * other.size())?, &mut after);
                let same = |(before, after): (&f32, &f32)| before == after || before.is_nan() && after.is_nan();
                if !before.iter().zip(&after).all(same) {
                    return Ok(true);
                }
            }
            Ok(false)
        }
        _ if entry.dtype != changed.dtype || entry.bytes != changed.bytes => Ok(true),
        _ => {
            for start in (0..entry.bytes).step_by(4 * PIECE) {
                let len = (4 * PIECE).min(entry.bytes - start);
                if base.read(entry, start, len)?[..] != tuned.read(changed, start, len)?[..] {
                    return Ok(true);
                }
            }
            Ok(false)
        }
    }
}

/// The name of the module whose weight this is, unless it looks its rows up instead of multiplying with them.
fn module(entry: &Entry) -> Option<&str> {
    const EMBEDDINGS: [&str; 6] = ["embed_tokens", "embeddings", "wte", "wpe", "tok_embeddings", "shared"];
    let module = entry.name.strip_suffix(".weight")?;
    let embedding = module.split('.').any(|part| EMBEDDINGS.contains(&part) || part.ends_with("_embeddings"));
    (!embedding).then_some(module)
}

fn matrix((shard, entry): Place<'_>) -> Result<HostMatrix> {
    let dtype = entry.float().ok_or_else(|| shard.refused(format!("`{}` holds {:?}", entry.name, entry.dtype)))?;
    let mut values = vec![0.0; entry.elements()];
    convert_elements::widen(dtype, &shard.read(entry, 0, entry.bytes)?, &mut values);
    HostMatrix::new((entry.shape[0], entry.shape[1]), values)
}

fn inside(name: &str, error: Error) -> Error {
    match error {
        Error::Value { verb, name: which, got, want } => {
            Error::Value { verb, name: which, got: format!("{got} in `{name}`"), want }
        }
        other => other,
    }
}
