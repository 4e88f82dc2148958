//! Finding the tensors of a checkpoint that an adapter refers to, also if their names differ.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::header::Entry;
use super::{Checkpoint, Shard, listed, refused};
use crate::error::Result;

/// Prefixes of names that transformers changed between versions. Either of the two may be the name in the adapter or in the
/// checkpoint.
const MOVED: [(&str, &str); 14] = [
    ("model.language_model.model.", "language_model.model."),
    ("model.language_model.lm_head", "language_model.lm_head"),
    ("model.language_model.", "language_model.model."),
    ("model.language_model.", "language_model."),
    ("model.language_model.", "model."),
    ("model.language_model.", "thinker.model."),
    ("model.visual.", "visual."),
    ("model.visual.", "thinker.visual."),
    ("model.vision_tower.", "vision_tower."),
    ("model.vision_model.", "vision_model."),
    ("model.audio_tower.", "audio_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head", "language_model.lm_head"),
    ("lm_head", "thinker.lm_head"),
];
/// Parts of names that changed, at any place in a name.
const PARTS: [(&str, &str); 3] = [
    (".mlp.experts.", ".block_sparse_moe.experts."),
    (".mlp.gate.", ".block_sparse_moe.gate."),
    (".mlp.router.", ".block_sparse_moe.gate."),
];
/// Names of modules that only contain the rest of a model, and may replace one another.
const CONTAINERS: [&str; 12] = [
    "model",
    "language_model",
    "text_model",
    "transformer",
    "base_model",
    "module",
    "_orig_mod",
    "backbone",
    "bert",
    "roberta",
    "llm",
    "gpt_neox",
];

/// Finds the tensors of a checkpoint by the names of an adapter.
pub(super) struct Names<'r> {
    base: &'r Checkpoint,
    /// The caller's mapping: pairs of a name or prefix in the adapter and the one in the checkpoint.
    mapped: &'r [(String, String)],
    used: Vec<bool>,
    /// Prefixes that were found: the one in the adapter, the one in the checkpoint, and the number of tensors.
    found: BTreeMap<String, (String, usize)>,
    /// Tensors by the last two components of their names.
    ends: HashMap<&'r str, Vec<&'r str>>,
}

/// A tensor and its file.
pub(super) type Place<'r> = (&'r Shard, &'r Entry);

impl<'r> Names<'r> {
    pub(super) fn new(base: &'r Checkpoint, mapped: &'r [(String, String)]) -> Self {
        let mut ends: HashMap<&str, Vec<&str>> = HashMap::new();
        for entry in base.entries() {
            ends.entry(end(&entry.name)).or_default().push(&entry.name);
        }
        Self { base, mapped, used: vec![false; mapped.len()], found: BTreeMap::new(), ends }
    }

    /// The tensor that an adapter refers to by this name, or else one of another name that fits; `None` if there is none.
    ///
    /// Errors: [`Error::File`](crate::Error::File) if several tensors fit.
    pub(super) fn find(&mut self, name: &str, fits: impl Fn(&Entry) -> bool) -> Result<Option<Place<'r>>> {
        for (at, (old, new)) in self.mapped.iter().enumerate() {
            if let Some(renamed) = replaced(name, old, new) {
                self.used[at] = true;
                let place = self.base.find(&renamed);
                let lacks = || refused(self.base.path(), format!("has no `{renamed}`, which `{name}` is mapped to"));
                return place.ok_or_else(lacks).map(Some);
            }
        }
        if let Some(place) = self.base.find(name) {
            return Ok(Some(place));
        }
        let known: Vec<(String, String)> = self.found.iter().map(|(old, (new, _))| (old.clone(), new.clone())).collect();
        for (old, new) in known {
            let place = name.strip_prefix(&old).and_then(|rest| self.base.find(&format!("{new}{rest}")));
            if let Some(place) = place.filter(|(_, entry)| fits(entry)) {
                return self.take(&old, &new, place);
            }
        }
        let moved = self.moved(name);
        let mut candidates: Vec<(String, String, Place<'r>)> = Vec::new();
        for (old, new, renamed) in moved {
            let place = self.base.find(&renamed).filter(|(_, entry)| fits(entry));
            candidates.extend(place.map(|place| (old, new, place)));
        }
        if candidates.is_empty() {
            candidates = self.longest(name, fits);
        }
        let mut seen = BTreeSet::new();
        candidates.retain(|(_, _, (_, entry))| seen.insert(&entry.name));
        match candidates.as_slice() {
            [] => Ok(None),
            [(old, new, place)] => {
                let (old, new, place) = (old.clone(), new.clone(), *place);
                self.take(&old, &new, place)
            }
            several => {
                let names: Vec<String> = several.iter().map(|(_, _, (_, entry))| entry.name.clone()).collect();
                let reason = format!("`{name}` of the adapter may be {}; say which with --map OLD=NEW", listed(&names));
                Err(refused(self.base.path(), reason))
            }
        }
    }

    /// The other names that [`MOVED`] and [`PARTS`] give, each with the replaced text and its replacement.
    fn moved(&self, name: &str) -> Vec<(String, String, String)> {
        let both = |&(one, other): &(&'static str, &'static str)| [(one, other), (other, one)];
        let mut renamed = Vec::new();
        for (old, new) in MOVED.iter().flat_map(both) {
            if let Some(rest) = name.strip_prefix(old) {
                renamed.push((old.to_string(), new.to_string(), format!("{new}{rest}")));
            }
        }
        for (old, new) in PARTS.iter().flat_map(both).filter(|(old, _)| name.contains(old)) {
            let at = name.find(old).unwrap_or_default();
            let (above, rest) = (&name[..at], &name[at + old.len()..]);
            renamed.push((format!("{above}{old}"), format!("{above}{new}"), format!("{above}{new}{rest}")));
        }
        renamed
    }

    /// The tensors that fit and have the longest common end with the name. The parts that differ must not contain numbers (of
    /// layers), and if both are non-empty, they must consist of [`CONTAINERS`].
    fn longest(&self, name: &str, fits: impl Fn(&Entry) -> bool) -> Vec<(String, String, Place<'r>)> {
        let parts: Vec<&str> = name.split('.').collect();
        let numbered = |parts: &[&str]| parts.iter().any(|part| part.parse::<usize>().is_ok());
        let contain = |parts: &[&str]| parts.iter().all(|part| CONTAINERS.contains(part));
        let (mut best, mut found) = (0, Vec::new());
        for there in self.ends.get(end(name)).into_iter().flatten() {
            let other: Vec<&str> = there.split('.').collect();
            let common = parts.iter().rev().zip(other.iter().rev()).take_while(|(one, other)| one == other).count();
            let (lost, gained) = (&parts[..parts.len() - common], &other[..other.len() - common]);
            let allowed = lost.is_empty() || gained.is_empty() || contain(lost) && contain(gained);
            if common < best || !allowed || numbered(lost) || numbered(gained) {
                continue;
            }
            let Some(place) = self.base.find(there).filter(|(_, entry)| fits(entry)) else { continue };
            if common > best {
                (best, found) = (common, Vec::new());
            }
            let joined = |parts: &[&str]| parts.iter().map(|part| format!("{part}.")).collect::<String>();
            found.push((joined(lost), joined(gained), place));
        }
        found
    }

    /// Records a replaced prefix. Errors: [`Error::File`](crate::Error::File) if a prefix has two different replacements.
    fn take(&mut self, old: &str, new: &str, place: Place<'r>) -> Result<Option<Place<'r>>> {
        let (there, count) = self.found.entry(old.into()).or_insert_with(|| (new.into(), 0));
        if there != new {
            let reason =
                format!("names that begin with `{old}` begin with `{there}` and with `{new}` here; say which with --map OLD=NEW");
            return Err(refused(self.base.path(), reason));
        }
        *count += 1;
        Ok(Some(place))
    }

    /// The tensors whose names have the same last two components: suggestions for a missing name.
    pub(super) fn similar(&self, name: &str) -> Vec<String> {
        self.ends.get(end(name)).into_iter().flatten().map(ToString::to_string).collect()
    }

    /// Errors: [`Error::File`](crate::Error::File) if an entry of the caller's mapping was not used.
    pub(super) fn all_used(&self) -> Result<()> {
        let unused = self.used.iter().zip(self.mapped).find(|(used, _)| !**used).map(|(_, (old, _))| old);
        let reason = |old| format!("--map: no name of the adapter begins with or is `{old}`");
        unused.map_or(Ok(()), |old| Err(refused(self.base.path(), reason(old))))
    }

    /// Notes about the prefixes that were replaced.
    pub(super) fn notes(self) -> Vec<String> {
        let mut found: BTreeMap<[String; 2], usize> = BTreeMap::new();
        for (old, (new, count)) in &self.found {
            *found.entry([unnumbered(old), unnumbered(new)]).or_default() += count;
        }
        let line = |([old, new], count): (&[String; 2], &usize)| {
            let what = match (old.as_str(), new.as_str()) {
                ("", new) => format!("the base has `{new}`, which the adapter leaves out"),
                (old, "") => format!("the adapter has `{old}`, which the base leaves out"),
                (old, new) => format!("`{old}` of the adapter is `{new}` in the base"),
            };
            format!("names: {what} ({count} tensors)")
        };
        found.iter().map(line).collect()
    }
}

/// A name with `N` for each number.
fn unnumbered(name: &str) -> String {
    let part = |part| if str::parse::<usize>(part).is_ok() { "N" } else { part };
    name.split('.').map(part).collect::<Vec<_>>().join(".")
}

/// The last two components of a name, such as `q_proj.weight`, or all of it.
fn end(name: &str) -> &str {
    let mut dots = name.rmatch_indices('.');
    dots.next();
    dots.next().map_or(name, |(at, _)| &name[at + 1..])
}

/// The name with its prefix `old` replaced by `new`; `None` if it does not have it. The prefix must end at a dot or at the end of
/// the name.
fn replaced(name: &str, old: &str, new: &str) -> Option<String> {
    let rest = name.strip_prefix(old)?;
    let whole = rest.is_empty() || rest.starts_with('.') || old.ends_with('.') || old.is_empty();
    whole.then(|| format!("{new}{rest}"))
}
