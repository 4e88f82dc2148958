//! Extracting an adapter from a base checkpoint and a fine-tuned one: `B·A ≈ W_tuned - W`.

use std::collections::BTreeMap;

use super::layout::{self, Layout};
use super::model::ModelConfig;
use super::names::Place;
use super::output::check_interrupted;
use super::{Checkpoint, Entry, Watch, listed, refused};
use crate::adapter::{self, Factors, Folder, HostMatrix, Keep, in_module};
use crate::element::DType;
use crate::error::Result;

/// The arguments of [`extract`].
#[derive(Debug)]
pub struct Extract<'e> {
    /// The model before fine-tuning.
    pub base: &'e Checkpoint,
    /// The model after fine-tuning.
    pub tuned: &'e Checkpoint,
    /// The rank, or the fraction of the energy, of each module's update.
    pub keep: Keep,
    /// The element type of the stored factors.
    pub dtype: DType,
    /// If true, changes that an adapter cannot hold, such as those of biases, norms and embeddings, are ignored instead of
    /// refused.
    pub leave_others: bool,
    /// The layout of linear layers, for models whose config does not determine it.
    pub layout: Option<Layout>,
}

/// The result of [`extract`].
#[derive(Clone, Debug)]
pub struct Extracted {
    /// The adapter.
    pub adapter: Folder,
    /// Changes of the fine-tuned model that are not in the adapter, a sentence for each reason.
    pub omitted: Vec<String>,
}

/// Extracts an adapter from all weights that differ, by truncated SVD. Weights are the two-dimensional tensors `x.weight`, except
/// embeddings.
///
/// Elements are compared by value, independent of the stored type. For weights that the model stores as `k×n` (GPT-2) the adapter
/// has `fan_in_fan_out`.
///
/// Errors: [`Error::File`](crate::Error::File) if no weight differs, if there is a change that an adapter cannot hold, such as a
/// tensor that only one of the models has, or if the layout of a layer is not known; [`Error::Value`](crate::Error::Value) for a
/// `keep` out of range; [`Error::Interrupted`](crate::Error::Interrupted).
pub fn extract(request: &Extract<'_>, watch: Watch<'_>) -> Result<Extracted> {
    let Extract { base, tuned, keep, dtype, leave_others, layout } = *request;
    base.check_plain_model()?;
    tuned.check_plain_model()?;
    let config = base.parent().and_then(ModelConfig::read);
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
                        let what =
                            "is named as in GPT-2, and without a config.json its layout (out × in or in × out) is not known";
                        refused(base.path(), format!("`{}` {what}; give --layout", entry.name))
                    })? == Layout::InOut;
                    let matrix = |place| matrix(place).map(|w| if transposed { w.transposed() } else { w });
                    let factors = adapter::extract(&matrix(place)?, &matrix(changed)?, keep);
                    let (a, b) = factors.map_err(|error| in_module(&entry.name, error))?;
                    in_out |= transposed;
                    modules.insert(name.to_string(), Factors { a, b, scaling: 1.0, dtype });
                }
                _ => others.changed.push(entry.name.clone()),
            },
            Some(_) => {}
        }
        check_interrupted(watch(entry.bytes as u64))?;
    }
    others.new = tuned.entries().filter(|entry| base.find(&entry.name).is_none()).map(|entry| entry.name.clone()).collect();
    let omitted = others.sentences(|names| names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", "));
    if !omitted.is_empty() && !leave_others {
        let changes = others.sentences(listed).join("; ");
        return Err(refused(tuned.path(), format!("{changes}; an adapter cannot hold this; --leave-others ignores it")));
    }
    if modules.is_empty() {
        return Err(refused(tuned.path(), "no weight differs from the base".into()));
    }
    let adapter = Folder::new(None, modules)?;
    Ok(Extracted { adapter: if in_out { adapter.stored_in_out()? } else { adapter }, omitted })
}

/// The names of tensors that differ and are not the weight of a module.
#[derive(Default)]
struct Others {
    changed: Vec<String>,
    resized: Vec<String>,
    gone: Vec<String>,
    new: Vec<String>,
}

impl Others {
    fn sentences(&self, names: impl Fn(&[String]) -> String) -> Vec<String> {
        let kinds = [
            (&self.changed, "other values than in the base"),
            (&self.resized, "another shape than in the base"),
            (&self.gone, "only in the base"),
            (&self.new, "only in the tuned model"),
        ];
        let kinds = kinds.iter().filter(|(kind, _)| !kind.is_empty());
        kinds.map(|(kind, what)| format!("{what}: {}", names(kind))).collect()
    }
}

/// The layout of a module; `None` if it is not known.
fn stored(config: Option<&ModelConfig>, requested: Option<Layout>, module: &str) -> Option<Layout> {
    let usual = (!layout::is_conv1d(module)).then_some(Layout::OutIn);
    layout::from_config(config, module).or(requested).or(usual)
}

/// True if two tensors of one shape have different values; their types may differ.
fn differs((base, entry): Place<'_>, (tuned, changed): Place<'_>) -> Result<bool> {
    const PIECE: usize = 1 << 21;
    match (entry.float(), changed.float()) {
        (Some(one), Some(other)) if one != other => {
            let total = entry.elements();
            for start in (0..total).step_by(PIECE) {
                let len = PIECE.min(total - start);
                let [mut before, mut after] = [vec![0.0; len], vec![0.0; len]];
                base.widen(entry, start, &mut before)?;
                tuned.widen(changed, start, &mut after)?;
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

/// The name of the module whose weight this is; `None` for other tensors and for embeddings.
fn module(entry: &Entry) -> Option<&str> {
    const EMBEDDINGS: [&str; 6] = ["embed_tokens", "embeddings", "wte", "wpe", "tok_embeddings", "shared"];
    let module = entry.name.strip_suffix(".weight")?;
    let embedding = module.split('.').any(|part| EMBEDDINGS.contains(&part) || part.ends_with("_embeddings"));
    (!embedding).then_some(module)
}

fn matrix((shard, entry): Place<'_>) -> Result<HostMatrix> {
    HostMatrix::new((entry.shape[0], entry.shape[1]), shard.widened(entry)?)
}
