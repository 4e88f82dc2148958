//! Plans a merge: the tensors that an adapter changes or adds, the edits of the config, and notes for the user.

use std::borrow::Cow;
use std::collections::BTreeMap;

use super::change::{Change, Magnitude, Piece, Source};
use super::header::{Entry, dimensions, stored_type};
use super::layout::{Layout, Layouts};
use super::model::{ConfigEdit, ModelConfig};
use super::names::{Names, Place};
use super::ties::{self, Tie};
use super::{Checkpoint, listed, refused};
use crate::adapter::{Extra, Factors, Folder, Kind, Role, TargetModules, module_of};
use crate::element::DType;
use crate::error::{Error, Result};

/// Options of the caller that resolve names and layouts.
#[derive(Clone, Copy, Default)]
pub(super) struct Options<'r> {
    /// Pairs of a name or prefix in the adapter and the one in the checkpoint.
    pub(super) names: &'r [(String, String)],
    pub(super) layout: Option<Layout>,
}

/// The changes that an adapter makes to a checkpoint.
pub(super) struct Plan<'r> {
    /// The changes, by the name of the tensor in the checkpoint.
    pub(super) changes: BTreeMap<String, Change<'r>>,
    /// Tensors that the checkpoint does not have. `changes` holds their values.
    pub(super) added: Vec<Entry>,
    pub(super) config: ConfigEdit,
    /// Notes for the user, a sentence each.
    pub(super) notes: Vec<String>,
}

/// A tensor that an adapter changes.
pub(super) struct Target<'r> {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    /// `None` for a tensor that the checkpoint does not have.
    pub(super) place: Option<Place<'r>>,
    source: Source<'r>,
}

pub(super) struct Planner<'r> {
    pub(super) base: &'r Checkpoint,
    adapter: &'r Folder,
    pub(super) names: Names<'r>,
    tie: Option<Tie<'r>>,
    changes: BTreeMap<String, Change<'r>>,
    missing: Vec<String>,
    notes: Vec<String>,
    config: ConfigEdit,
}

impl<'r> Plan<'r> {
    /// Errors: [`Error::File`] for tensors that are missing, ambiguous, of another shape, or changed twice.
    pub(super) fn new(base: &'r Checkpoint, adapter: &'r Folder, options: Options<'r>) -> Result<Self> {
        let config = base.parent().and_then(ModelConfig::read);
        let tie = Tie::of(base, config.as_ref());
        let (names, layouts) =
            (Names::new(base, options.names), Layouts::new(options.layout, config.as_ref(), adapter.config().fan_in_fan_out()));
        let (changes, missing, notes) = Default::default();
        let mut planner = Planner { base, adapter, names, tie, changes, missing, notes, config: ConfigEdit::default() };
        planner.modules(layouts)?;
        planner.extras()?;
        planner.all_found()?;
        planner.ties()?;
        planner.finish(config.as_ref())
    }
}

impl<'r> Planner<'r> {
    /// The tensor that an adapter refers to by this name. An output head that shares the embedding's weight is found even if it
    /// is not stored.
    pub(super) fn target(&mut self, name: &str, fits: impl Fn(&[usize]) -> bool) -> Result<Option<Target<'r>>> {
        if let Some(place) = self.names.find(name, |entry| fits(&entry.shape))? {
            let (name, shape) = (place.1.name.clone(), place.1.shape.clone());
            return Ok(Some(Target { name, shape, place: Some(place), source: Source::Stored }));
        }
        let tie = self.tie.as_ref().filter(|tie| ties::is_head(name) && tie.known && !tie.stored);
        let Some((place, head)) = tie.and_then(|tie| Some((tie.embedding, tie.head.clone()?))) else { return Ok(None) };
        Ok(Some(Target { name: head, shape: place.1.shape.clone(), place: None, source: Source::Other(place) }))
    }

    /// Adds a change of a tensor. Errors: [`Error::File`] if it has one already.
    pub(super) fn change(&mut self, target: &Target<'r>) -> Result<&mut Change<'r>> {
        if self.changes.contains_key(&target.name) {
            return Err(refused(self.base.path(), format!("`{}` is changed in two ways by the adapter", target.name)));
        }
        let change = Change { source: target.source, ..Change::of(&target.shape) };
        Ok(self.changes.entry(target.name.clone()).or_insert(change))
    }

    fn modules(&mut self, mut layouts: Layouts<'_>) -> Result<()> {
        let adapter = self.adapter;
        let mut linear = Vec::new();
        for (module, factors) in adapter.modules() {
            let (name, [n, k]) = (format!("{module}.weight"), [factors.b.rows(), factors.a.cols()]);
            match adapter.kind(module) {
                Kind::Linear => {
                    let found = self.target(&name, |shape| shape == [n, k] || shape == [k, n])?;
                    match found.or_else(|| self.new_module(module, &name)) {
                        Some(target) => {
                            layouts.observe(module, &target.shape, [n, k]);
                            linear.push((module, factors, target));
                        }
                        None => self.missing.push(name),
                    }
                }
                Kind::Embedding => match self.target(&name, |shape| shape == [k, n])? {
                    Some(target) => self.update(module, factors, (target, &[k, n], true))?,
                    None => self.missing.push(name),
                },
                Kind::Convolution { channels, kernel } => {
                    let want = [&[n, *channels], &kernel[..]].concat();
                    match self.target(&name, |shape| shape == want)? {
                        Some(target) => self.update(module, factors, (target, &want, false))?,
                        None => self.missing.push(name),
                    }
                }
                Kind::Parameter { experts, .. } => self.parameter((module, factors), *experts, &layouts)?,
            }
        }
        for (module, factors, target) in linear {
            let sides = [factors.b.rows(), factors.a.cols()];
            let layout = layouts.of(module, &target.shape, sides).ok_or_else(|| {
                let what =
                    "`fan_in_fan_out` is set, and it is not known whether this square weight is stored out × in or in × out";
                refused(self.base.path(), format!("`{}`: {what}; give --layout out-in or --layout in-out", target.name))
            })?;
            let [n, k] = sides;
            let (want, transposed) = if layout == Layout::InOut { ([k, n], true) } else { ([n, k], false) };
            self.update(module, factors, (target, &want, transposed))?;
        }
        Ok(())
    }

    /// A module that the checkpoint lacks and whose weight is in the adapter: `base_layer.weight`.
    fn new_module(&self, module: &str, name: &str) -> Option<Target<'r>> {
        let extra = self.adapter.extras().get(&format!("{module}.base_layer.weight"))?;
        let (name, shape, source) = (name.to_string(), extra.tensor.shape.clone(), Source::Replacement(&extra.tensor.values));
        self.names.similar(&name).is_empty().then_some(Target { name, shape, place: None, source })
    }

    /// Plans the update of a whole tensor, with its magnitudes and a new base weight if the adapter has them.
    fn update(
        &mut self,
        module: &str,
        factors: &'r Factors,
        (mut target, want, transposed): (Target<'r>, &[usize], bool),
    ) -> Result<()> {
        let (adapter, base) = (self.adapter, self.base);
        if let Some(extra) = adapter.extras().get(&format!("{module}.base_layer.weight")) {
            (target.shape, target.source) = (extra.tensor.shape.clone(), Source::Replacement(&extra.tensor.values));
            self.note_resized(&target, want);
        }
        self.fits(&target, want)?;
        let principal = adapter.config().principal().filter(|_| *adapter.kind(module) == Kind::Linear);
        if let (Some(part), false) = (principal, matches!(target.source, Source::Stored)) {
            let reason = format!(
                "`{}` is not stored as it was when the adapter was initialised with a part of it ({})",
                target.name,
                part.name()
            );
            return Err(refused(base.path(), reason));
        }
        let magnitude = adapter.extras().get(&format!("{module}.lora_magnitude_vector"));
        let change = self.change(&target)?;
        change.pieces.push(Piece { first_row: 0, factors: Cow::Borrowed(factors), transposed, principal });
        change.magnitude = magnitude.map(|extra| Magnitude { of_columns: transposed, values: &extra.tensor.values });
        Ok(())
    }

    /// Errors: [`Error::File`] unless a tensor has this shape and holds floats.
    pub(super) fn fits(&self, target: &Target<'r>, want: &[usize]) -> Result<()> {
        let path = target.place.map_or(self.base.path(), |(shard, _)| &shard.path);
        if target.shape != want {
            let (got, want) = (dimensions(&target.shape), dimensions(want));
            return Err(refused(path, format!("`{}` is {got}, want {want} for the adapter", target.name)));
        }
        match target.place {
            Some((shard, entry)) if entry.float().is_none() => {
                Err(shard.refused(format!("`{}` holds {:?}, want F32, F16 or BF16 to be merged into", entry.name, entry.dtype)))
            }
            _ => Ok(()),
        }
    }

    fn extras(&mut self) -> Result<()> {
        let adapter = self.adapter;
        for extra in adapter.extras().values() {
            match extra.role {
                Role::Magnitude => {}
                Role::Base if adapter.modules().contains_key(module_of(&extra.target)) => {}
                Role::Base | Role::Replace => self.replace_tensor(extra)?,
                Role::AddToBias => {
                    let scaling = adapter.modules().get(module_of(&extra.target)).map_or(0.0, |module| module.scaling);
                    let Some(target) = self.target(&extra.target, |shape| shape == extra.tensor.shape)? else {
                        self.missing.push(extra.target.clone());
                        continue;
                    };
                    self.fits(&target, &extra.tensor.shape)?;
                    self.change(&target)?.plus = Some((scaling, &extra.tensor.values));
                }
                Role::Rows => self.rows(extra)?,
            }
        }
        Ok(())
    }

    /// Plans the replacement of a tensor, perhaps with another number of rows, or the addition of a new one.
    fn replace_tensor(&mut self, extra: &'r Extra) -> Result<()> {
        let new = &extra.tensor.shape;
        let like = |shape: &[usize]| shape.len() == new.len() && shape.get(1..) == new.get(1..);
        let Some(target) = self.target(&extra.target, like)? else {
            let longer = format!(".{}", extra.target);
            let similar: Vec<String> =
                self.names.similar(&extra.target).into_iter().filter(|name| name.ends_with(&longer)).collect();
            let numbered = extra.target.split('.').any(|part| part.parse::<usize>().is_ok());
            if numbered
                || extra.target.ends_with(".bias") && self.base.find(&format!("{}.weight", module_of(&extra.target))).is_some()
            {
                self.missing.push(extra.target.clone());
                return Ok(());
            }
            if !similar.is_empty() {
                let hint = format!("has no `{}`, which the adapter replaces, but {}", extra.target, listed(&similar));
                return Err(refused(self.base.path(), format!("{hint}; give the right one with --map OLD=NEW")));
            }
            self.notes.push(format!("added: `{}` ({}), which the base does not have", extra.target, dimensions(new)));
            let target = Target {
                name: extra.target.clone(),
                shape: new.clone(),
                place: None,
                source: Source::Replacement(&extra.tensor.values),
            };
            return self.change(&target).map(drop);
        };
        let resizes = like(&target.shape) && target.shape != *new;
        if resizes && !self.may_resize(extra) || !like(&target.shape) {
            return self.fits(&target, new);
        }
        self.fits(&Target { shape: new.clone(), name: target.name.clone(), ..target }, new)?;
        self.note_resized(&target, new);
        let target = Target { shape: new.clone(), source: Source::Replacement(&extra.tensor.values), ..target };
        self.change(&target).map(drop)
    }

    /// Adds a note about a tensor that gets another shape.
    fn note_resized(&mut self, target: &Target<'r>, new: &[usize]) {
        let Some((_, entry)) = target.place.filter(|(_, entry)| entry.shape != new) else { return };
        self.notes.push(format!("resized: `{}` from {} to {}", target.name, entry.dimensions(), dimensions(new)));
        if ties::is_embedding(&target.name) {
            self.config.vocabulary = Some([entry.shape[0], new[0]]);
        }
    }

    /// True if a tensor may get another number of rows: the adapter replaces its whole module.
    fn may_resize(&self, extra: &Extra) -> bool {
        self.adapter.extras().values().any(|other| {
            let weight = format!("{}.weight", module_of(&extra.target));
            matches!(other.role, Role::Replace | Role::Base) && other.target == weight
        })
    }

    /// Plans the replacement of some rows of a table.
    fn rows(&mut self, extra: &'r Extra) -> Result<()> {
        let (adapter, module) = (self.adapter, module_of(&extra.target));
        let rows = adapter.config().tokens(module).unwrap_or_default();
        let cols = extra.tensor.shape.get(1).copied().unwrap_or_default();
        let Some(target) = self.target(&extra.target, |shape| shape.len() == 2 && shape[1] == cols)? else {
            self.missing.push(extra.target.clone());
            return Ok(());
        };
        self.fits(&target, &[target.shape[0], cols])?;
        let outside = rows.iter().find(|&&row| row >= target.shape[0]);
        if extra.tensor.shape != [rows.len(), cols] || outside.is_some() {
            let reason = format!(
                "`trainable_token_indices` names {} rows, the adapter has {}, and `{}` has {}",
                rows.len(),
                dimensions(&extra.tensor.shape),
                target.name,
                dimensions(&target.shape)
            );
            return Err(refused(self.base.path(), reason));
        }
        self.change(&target)?.rows = Some((rows, &extra.tensor.values));
        Ok(())
    }

    fn all_found(&self) -> Result<()> {
        self.names.all_used()?;
        if self.missing.is_empty() {
            return Ok(());
        }
        let similar = self.missing.first().map(|name| self.names.similar(name)).unwrap_or_default();
        let hint = match similar.as_slice() {
            [] => String::new(),
            names => format!("; it has {}: if these are meant, map the names with --map OLD=NEW", listed(names)),
        };
        Err(refused(self.base.path(), format!("has no {}, which the adapter changes{hint}", listed(&self.missing))))
    }

    /// Separates an output head from the embedding whose weight it shares, unless the adapter changes both alike.
    fn ties(&mut self) -> Result<()> {
        if let Some(name) = self.changes.keys().find(|name| ties::is_shared(self.base, name)).filter(|_| self.tie.is_none()) {
            let what = "is shared by the encoder, the decoder and the output head, and it is not known which of them the adapter changes";
            return Err(refused(
                self.base.path(),
                format!("`{name}` {what}; store them as separate tensors first (tie_word_embeddings: false)"),
            ));
        }
        self.all_targeted()?;
        let Some(tie) = self.tie.clone() else { return Ok(()) };
        let (embedding, Some(head)) = (tie.embedding.1.name.clone(), tie.head.clone().or(Some(String::new()))) else {
            return Ok(());
        };
        let (changed, head_changed) = (self.changes.get(&embedding), self.changes.get(&head));
        let refuse =
            |why: &str| Err(refused(self.base.path(), format!("`{embedding}` is also the weight of the output head, and {why}")));
        let follows = match (changed, head_changed) {
            (None, None) => return Ok(()),
            (Some(one), Some(other)) => ties::same(one, other),
            (Some(change), None) => self.adapter.config().ensures_weight_tying() || change.rows.is_some(),
            (None, Some(_)) => false,
        };
        if follows {
            match (changed, tie.stored) {
                (Some(change), true) if head_changed.is_none() => drop(self.changes.insert(head, change.copied())),
                (_, false) => drop(self.changes.remove(&head)),
                _ => {}
            }
            return Ok(());
        }
        if self.adapter.config().ensures_weight_tying() {
            return refuse("the adapter changes the head in another way, although its `ensure_weight_tying` is set");
        }
        if !tie.known {
            self.notes.push(format!(
                "`{embedding}` is changed; without a config.json it is not known whether the head shares it; if so, the head changes too"
            ));
            return Ok(());
        }
        if !self.base.is_folder() {
            return refuse(
                "the adapter changes only one of them, so the config must be changed; give the model's folder as the base",
            );
        }
        if let (Some(change), None, false) = (changed, head_changed, tie.stored) {
            if change.shape != tie.embedding.1.shape {
                return refuse("the adapter has another number of rows for the embedding only");
            }
            if head.is_empty() {
                return refuse("the name that a separate head would have is not known for this model");
            }
            let change = Change { source: Source::Other(tie.embedding), ..Change::of(&tie.embedding.1.shape) };
            self.changes.insert(head.clone(), change);
        }
        self.untie_bias(&head);
        self.notes.push(format!("untied: `{head}` is no longer `{embedding}`; config.json says `tie_word_embeddings: false`"));
        self.config.untie = true;
        Ok(())
    }

    /// Errors: [`Error::File`] for the update of an output head that is not one of the `target_modules` and has no tied weight.
    fn all_targeted(&self) -> Result<()> {
        if self.tie.is_some() {
            return Ok(());
        }
        let targeted =
            |module: &str| self.adapter.config().lora_config(module).is_some() || !ties::is_head(&format!("{module}.weight"));
        match self.adapter.modules().keys().find(|module| !targeted(module)) {
            Some(module) => {
                let why = "is not one of the `target_modules`, and the weights of this model are not tied";
                Err(refused(self.base.path(), format!("`{module}`, which the adapter changes, {why}")))
            }
            None => Ok(()),
        }
    }

    /// Stores the bias that a head has of its own once its weight is not shared.
    fn untie_bias(&mut self, head: &str) {
        let Some([bias, shared]) = ties::biases(head) else { return };
        let Some(place) = self.base.find(&shared).filter(|_| self.base.find(&bias).is_none()) else { return };
        let mut change = self.changes.get(&place.1.name).map_or_else(|| Change::of(&place.1.shape), Change::copied);
        if matches!(change.source, Source::Stored) {
            change.source = Source::Other(place);
        }
        self.changes.entry(bias).or_insert(change);
    }

    fn finish(mut self, config: Option<&ModelConfig>) -> Result<Plan<'r>> {
        let dtype = usual_dtype(self.base);
        let base = self.base;
        let new = self.changes.iter().filter(|(name, _)| base.find(name).is_none());
        let added: Vec<Entry> = new
            .map(|(name, change)| {
                let dtype = match change.source {
                    Source::Other((_, entry)) => entry.float().unwrap_or(dtype),
                    Source::Stored | Source::Replacement(_) => dtype,
                };
                Entry::new(name, stored_type(dtype), change.shape.clone())
            })
            .collect();
        let heads: Vec<String> = added
            .iter()
            .map(|entry| entry.name.clone())
            .filter(|name| !ties::is_head(name) && !ties::is_head_bias(name))
            .collect();
        if let (Some(class), false) = (config.and_then(ModelConfig::architecture), heads.is_empty()) {
            self.notes.push(format!("config.json still names {class}: load {} with the class that has them", listed(&heads)));
        }
        self.notes.extend(self.unsaved());
        if self.adapter.changes_nothing() {
            self.notes.push("the adapter changes nothing: all of its updates are zero".into());
        }
        let notes = self.names.notes().into_iter().chain(self.notes).collect();
        Ok(Plan { changes: self.changes, added, config: self.config, notes })
    }

    /// A note about weights that the settings select and for which the adapter has no factors.
    fn unsaved(&self) -> Option<String> {
        let config = self.adapter.config();
        if config.target_modules() == TargetModules::AllLinear {
            return None;
        }
        let selected = |entry: &&Entry| {
            let module = entry.name.strip_suffix(".weight").filter(|_| entry.shape.len() >= 2);
            module.is_some_and(|module| config.lora_config(module).is_some() && !self.changes.contains_key(&entry.name))
        };
        let names: Vec<String> = self.base.entries().filter(selected).map(|entry| entry.name.clone()).collect();
        let what = "tensors that `target_modules` selects, but for which the adapter has no factors";
        (!names.is_empty()).then(|| format!("unchanged: {} {what}: {}", names.len(), listed(&names)))
    }
}

/// The element type that most elements have.
fn usual_dtype(base: &Checkpoint) -> DType {
    let mut counts = [(DType::F32, 0), (DType::F16, 0), (DType::BF16, 0)];
    for (dtype, entry) in base.entries().filter_map(|entry| Some((entry.float()?, entry))) {
        counts.iter_mut().filter(|(known, _)| *known == dtype).for_each(|(_, count)| *count += entry.elements());
    }
    counts.into_iter().max_by_key(|(_, count)| *count).map_or(DType::F32, |(dtype, _)| dtype)
}

/// Errors: [`Error::File`] for a plan that adds or resizes tensors, because a residue cannot undo that.
pub(super) fn check_shapes_kept(plan: &Plan<'_>, base: &Checkpoint) -> Result<(), Error> {
    let resized =
        plan.changes.iter().find(|(name, change)| base.find(name).is_some_and(|(_, entry)| entry.shape != change.shape));
    let name = resized.map(|(name, _)| name).or_else(|| plan.added.first().map(|entry| &entry.name));
    let what = "is new, or of another shape, after merging, which a residue cannot undo; keep the base";
    name.map_or(Ok(()), |name| Err(refused(base.path(), format!("`{name}` {what}"))))
}
