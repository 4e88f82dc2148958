//! The same checkpoint with its weights quantised, or dequantised; and an adapter merged into one that is quantised.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::json;

use super::header::Entry;
use super::layout::{self, Layout};
use super::merge::{Merge, merge_plain};
use super::model::{ConfigEdit, ModelConfig};
use super::quantised::{State, bytes, companions, stored};
use super::rewrite::{Edit, Pass, rewrite};
use super::{Checkpoint, Shard, Watch, refused};
use crate::adapter::{convert_elements, stored_type};
use crate::element::DType;
use crate::error::{Error, Result};
use crate::file::{StagedFolder, renamed};
use crate::quant::{HostQuantised, QuantKind};

/// The last names of modules that are no linear layers, or whose errors cost most: as transformers, heads and embeddings stay.
const KEPT: [&str; 9] =
    ["lm_head", "embed_tokens", "embed_out", "wte", "wpe", "shared", "word_embeddings", "position_embeddings", "score"];

/// What to [`quantise`].
#[derive(Clone, Copy, Debug)]
pub struct Quantise<'q> {
    /// The model, whose weights are `f32`, `f16` or `bf16`.
    pub base: &'q Checkpoint,
    /// How: `nf4`, `fp4` or `int8`, which bitsandbytes reads.
    pub kind: QuantKind,
    /// The new checkpoint: a file if `base` was opened as one, else a folder that is not there yet.
    pub out: &'q Path,
    /// Modules that stay as they are, by their name or the last part of it, beside heads and embeddings.
    pub skip: &'q [String],
}

/// Writes a checkpoint whose linear layers' weights are quantised as bitsandbytes serialises them, and a `config.json` that says so, so
/// that transformers loads it. One weight at a time is in memory. Gives what the caller should know: the measured error.
///
/// Weights are the matrices called `….weight`, but for heads and embeddings. Errors: [`Error::File`] for a model that is quantised
/// already, one that stores its layers `k×n`, or without a matrix; [`Error::Value`] for a number that is not finite, and for Q8_0, which
/// safetensors have no name for; [`Error::Interrupted`].
pub fn quantise(request: &Quantise<'_>, mut watch: Watch<'_>) -> Result<Vec<String>> {
    let Quantise { base, kind, out, skip } = *request;
    base.check_plain_model()?;
    Error::unless(kind != QuantKind::Q8_0, "quantise", "type", kind, "nf4, fp4 or int8: safetensors have no name for Q8_0")?;
    kind.check()?;
    let config = base.parent().and_then(ModelConfig::read);
    let mut edit = Quantiser { kind, skip, squares: [0.0; 2], sizes: [0; 2], count: 0 };
    let mut taken = base.entries().filter(|entry| edit.takes(entry)).peekable();
    if taken.peek().is_none() {
        return Err(refused(
            base.path(),
            "has no weight to quantise: no matrix called `….weight` but heads and embeddings".into(),
        ));
    }
    let module = |entry: &Entry| entry.name.strip_suffix(".weight").unwrap_or_default().to_string();
    if let Some(entry) = taken.find(|entry| layout::from_config(config.as_ref(), &module(entry)) == Some(Layout::InOut)) {
        return Err(refused(base.path(), format!("`{}` is stored k×n, as Conv1D has it, which is not quantised", entry.name)));
    }
    let (staged, mut notes) = rewrite(base, out, &mut edit, &mut watch)?;
    staged.publish()?;
    notes.push(edit.told());
    Ok(notes)
}

/// Quantises the weights it takes.
struct Quantiser<'q> {
    kind: QuantKind,
    skip: &'q [String],
    /// Of errors, and of weights.
    squares: [f64; 2],
    /// Bytes before, and after.
    sizes: [usize; 2],
    count: usize,
}

impl Quantiser<'_> {
    fn takes(&self, entry: &Entry) -> bool {
        let Some(module) = entry.name.strip_suffix(".weight") else { return false };
        let last = module.rsplit('.').next().unwrap_or(module);
        let skipped = self.skip.iter().any(|skip| skip == module || skip == last);
        entry.float().is_some() && entry.shape.len() == 2 && entry.elements() > 0 && !skipped && !KEPT.contains(&last)
    }

    fn told(&self) -> String {
        let error = (self.squares[0] / self.squares[1].max(f64::MIN_POSITIVE)).sqrt();
        let [before, after] = self.sizes;
        format!("{} weights quantised as {}: {before} bytes became {after}, relative error {error:.4}", self.count, self.kind)
    }
}

impl Edit for Quantiser<'_> {
    fn stored(&self, entry: &Entry) -> Entry {
        entry.clone()
    }

    fn parts(&self, entry: &Entry) -> Result<Vec<Entry>> {
        match entry.shape[..] {
            [n, k] if self.takes(entry) => stored(&entry.name, [n, k], self.kind),
            _ => Ok(vec![entry.clone()]),
        }
    }

    fn config(&self) -> ConfigEdit {
        let four = self.kind.four_bits().map(|(_, blocks)| blocks);
        let skipped: Vec<&str> = ["lm_head"].into_iter().chain(self.skip.iter().map(String::as_str)).collect();
        let mut quantisation = json!({
            "quant_method": "bitsandbytes",
            "load_in_4bit": four.is_some(),
            "load_in_8bit": four.is_none(),
            "llm_int8_skip_modules": skipped,
        });
        if let Some(blocks) = four {
            quantisation["bnb_4bit_quant_type"] = json!(self.kind.name());
            quantisation["bnb_4bit_use_double_quant"] = json!(blocks.double);
            quantisation["bnb_4bit_compute_dtype"] = json!("bfloat16");
            quantisation["bnb_4bit_quant_storage"] = json!("uint8");
        }
        ConfigEdit { quantisation: Some(Some(quantisation)), ..ConfigEdit::default() }
    }

    fn write(&mut self, shard: &Shard, entry: &Entry, pass: &mut Pass<'_, '_>) -> Result<()> {
        let (Some(dtype), true) = (entry.float(), self.takes(entry)) else { return pass.copy(shard, entry) };
        let (numbers, shape) = (shard.widened(entry)?, [entry.shape[0], entry.shape[1]]);
        let w = HostQuantised::quantise((shape[0], shape[1]), &numbers, self.kind)
            .map_err(|error| shard.refused(format!("`{}`: {error}", entry.name)))?;
        let entries = stored(&entry.name, shape, self.kind)?;
        for (number, got) in numbers.iter().zip(w.dequantise::<f32>()) {
            self.squares[0] += f64::from(got - number).powi(2);
            self.squares[1] += f64::from(*number).powi(2);
        }
        self.count += 1;
        self.sizes[0] += entry.bytes;
        for part in bytes(&w, dtype, &entries) {
            self.sizes[1] += part.len();
            pass.write(part)?;
        }
        pass.done(entry.bytes)
    }
}

/// Writes a checkpoint whose weights, quantised by bitsandbytes, are dense: of `dtype`, or of the type that they had before (`bf16` where
/// that is not told). All else stays as it is. Gives what the caller should know.
///
/// Errors: [`Error::File`] for a model that is not quantised, or so that it cannot be read; [`Error::Interrupted`].
pub fn dequantise(base: &Checkpoint, dtype: Option<DType>, out: &Path, mut watch: Watch<'_>) -> Result<Vec<String>> {
    let states = base.states()?;
    if states.is_empty() {
        base.check_plain_model()?;
        return Err(refused(base.path(), "is not quantised".into()));
    }
    let parts = states.iter().flat_map(|(name, state)| companions(name, state.kind)).collect();
    let count = states.len();
    let mut edit = Dequantiser { base, dtype, states, parts };
    let (staged, mut notes) = rewrite(base, out, &mut edit, &mut watch)?;
    staged.publish()?;
    notes.push(format!("{count} weights dequantised"));
    Ok(notes)
}

struct Dequantiser<'c> {
    base: &'c Checkpoint,
    dtype: Option<DType>,
    states: BTreeMap<String, State>,
    /// The tensors that belong to quantised weights.
    parts: BTreeSet<String>,
}

impl Dequantiser<'_> {
    fn dtype(&self, state: &State) -> DType {
        self.dtype.or(state.dtype).unwrap_or(DType::BF16)
    }
}

impl Edit for Dequantiser<'_> {
    fn stored(&self, entry: &Entry) -> Entry {
        match self.states.get(&entry.name) {
            Some(state) => Entry::new(&entry.name, stored_type(self.dtype(state)), state.shape.to_vec()),
            None => entry.clone(),
        }
    }

    fn parts(&self, entry: &Entry) -> Result<Vec<Entry>> {
        if let Some(State { kind, shape: [n, k], .. }) = self.states.get(&entry.name) {
            kind.counts((*n, *k).into())?; // a shape that cannot be counted ends here
            if entry.bytes != kind.counts((*n, *k).into())?.codes {
                let reason = format!("`{}` has {} bytes, which {n}×{k} of {kind} cannot be", entry.name, entry.bytes);
                return Err(refused(self.base.path(), reason));
            }
        }
        Ok(if self.parts.contains(&entry.name) { Vec::new() } else { vec![self.stored(entry)] })
    }

    fn config(&self) -> ConfigEdit {
        ConfigEdit { quantisation: Some(None), dtype: self.dtype, ..ConfigEdit::default() }
    }

    fn write(&mut self, shard: &Shard, entry: &Entry, pass: &mut Pass<'_, '_>) -> Result<()> {
        if self.parts.contains(&entry.name) {
            return pass.done(entry.bytes);
        }
        let Some(state) = self.states.get(&entry.name) else { return pass.copy(shard, entry) };
        let (numbers, dtype) = (self.base.read_quantised(&entry.name, *state)?.dequantise::<f32>(), self.dtype(state));
        let mut narrow = pass.buffer(numbers.len() * dtype.size());
        if !convert_elements::round(dtype, &numbers, &mut narrow) {
            return Err(shard.refused(format!("`{}` holds more than {dtype} can", entry.name)));
        }
        pass.write(narrow)?;
        pass.done(entry.bytes)
    }
}

/// [`merge`](super::merge()) into a model whose weights are quantised: dequantised and merged in `f32`, beside `out`, and rounded once.
pub(super) fn merge_quantised(request: &Merge<'_>, watch: Watch<'_>) -> Result<Vec<String>> {
    let want = "absent: the quantised model itself is what was there before";
    Error::unless(request.keep_residue.is_none(), "merge", "keep_residue", "set, for a quantised model", want)?;
    let staged = StagedFolder::beside(request.out)?;
    merge_dequantised(request, staged.inside(), watch).map_err(|error| renamed(error, staged.inside(), request.out))
}

/// [`merge_quantised`] with a folder for the dequantised model.
fn merge_dequantised(request: &Merge<'_>, folder: &Path, watch: Watch<'_>) -> Result<Vec<String>> {
    let Merge { base, out, dtype, requantise, .. } = *request;
    let inside = |name: &str| folder.join(if base.is_folder() { name.into() } else { format!("{name}.safetensors") });
    let mut notes = dequantise(base, Some(DType::F32), &inside("base"), &mut |_| watch(0))?;
    let dense = Checkpoint::open(&inside("base"))?;
    let Some(kind) = requantise else {
        let dtype = Some(dtype.unwrap_or(DType::BF16));
        notes.extend(merge_plain(&Merge { base: &dense, dtype, ..*request }, watch)?);
        return Ok(notes);
    };
    notes.extend(merge_plain(&Merge { base: &dense, dtype: None, out: &inside("merged"), requantise: None, ..*request }, watch)?);
    let merged = Checkpoint::open(&inside("merged"))?;
    let states = base.states()?;
    let skip: Vec<String> =
        merged.entries().map(|entry| &entry.name).filter(|name| !states.contains_key(*name)).cloned().collect();
    let skip: Vec<String> = skip.iter().filter_map(|name| name.strip_suffix(".weight").map(String::from)).collect();
    notes.extend(quantise(&Quantise { base: &merged, kind, out, skip: &skip }, watch)?);
    notes.push(lost(&dense, &merged, &Checkpoint::open(out)?, states.keys())?);
    Ok(notes)
}

/// How large the error of requantising is beside the update that was merged.
fn lost<'n>(
    before: &Checkpoint,
    merged: &Checkpoint,
    requantised: &Checkpoint,
    names: impl Iterator<Item = &'n String>,
) -> Result<String> {
    let (mut error, mut update) = (0.0, 0.0);
    for name in names {
        let (before, merged) = (before.tensor(name)?.values, merged.tensor(name)?.values);
        if before == merged {
            continue;
        }
        let got = requantised.quantised(name)?.dequantise::<f32>();
        for ((before, merged), got) in before.iter().zip(&merged).zip(got) {
            error += f64::from(got - merged).powi(2);
            update += f64::from(merged - before).powi(2);
        }
    }
    let times = (error / f64::max(update, f64::MIN_POSITIVE)).sqrt();
    Ok(format!("warning: requantising rounds the merged weights; its error is {times:.2} times the update itself"))
}
