//! Many adapters of one model, for batches in which each row uses its own.

mod forward;
mod host;
mod sweep;

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub use forward::Mixed;
pub use host::{HostAdapter, HostUpdate};
pub use sweep::{Recipe, Sweep};

use super::Adaptable;
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::op::{Assignment, Bank};
use crate::tensor::Shape;

/// Slots for adapters of one model: a [`Bank`] for each of its layers, and the names of those that are in it.
///
/// Many more adapters can be kept in host memory or on disk. [`assign`](Self::assign) says which rows of a batch use which adapter, and
/// fetches those that are in no slot, in place of the ones that were used the longest ago. One that a batch [uses](MixedRows), or that is
/// [pinned](Self::set_pinned), stays.
///
/// ```
/// use lowrank::nn::{Adaptable, AdapterBank, HostAdapter, LoraConfig, Mlp, Targets};
/// use lowrank::{Cpu, Tensor, autograd::Tape, random::Rng};
///
/// let (cpu, rng) = (Cpu::<f32>::new()?, &mut Rng::new(0));
/// let mut model = Mlp::new(&cpu, &[4, 8, 3], rng)?;
/// let mut on_host = Vec::new();
/// for name in ["ann", "bob", "eve"] {
///     model.add_adapter(&cpu, name, Targets::All, &LoraConfig::new(2, 4.0), rng)?;
///     on_host.push((name, HostAdapter::of_model(&cpu, &model, name)?));
/// }
///
/// let mut bank = AdapterBank::new(&cpu, &model, 2, 2)?; // 2 slots of rank 2
/// let fetch = |name: &str| Ok(on_host.iter().find(|(known, _)| *known == name).expect("known").1.clone());
/// let rows = bank.assign(&cpu, &[Some("eve"), None, Some("ann")], fetch)?;
///
/// let mut tape = Tape::new(&cpu);
/// let x = tape.input(Tensor::from_slice(&cpu, (3, 4), &[0.1; 12])?);
/// let y = model.forward_mixed(&mut tape, x, None, bank.mixed(&rows)?)?;
/// assert_eq!(tape.value(y)?.shape(), (3, 3).into());
/// # Ok::<(), lowrank::Error>(())
/// ```
#[derive(Debug)]
pub struct AdapterBank<B: Backend> {
    id: u64,
    layers: Vec<(String, Bank<B>)>,
    slots: Vec<Option<Occupant>>,
    by_name: HashMap<String, usize>,
    uses: u64,
    counts: BankCounts,
}

/// Cache statistics of an [`AdapterBank`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BankCounts {
    /// Adapters of batches that were in a slot.
    pub hits: u64,
    /// Adapters that were put into a slot.
    pub loads: u64,
    /// Adapters that made room for others.
    pub evictions: u64,
}

/// The adapter in a slot.
#[derive(Debug)]
struct Occupant {
    name: String,
    last_use: u64,
    pinned: bool,
    /// Shared with the batches that use it.
    users: Arc<()>,
}

impl Occupant {
    fn is_in_use(&self) -> bool {
        Arc::strong_count(&self.users) > 1
    }
}

/// The adapter of an [`AdapterBank`] that each row of a batch uses. While it lives, their slots are neither overwritten nor emptied.
#[derive(Debug)]
pub struct MixedRows<B: Backend> {
    bank: u64,
    assignment: Assignment<B>,
    _users: Vec<Arc<()>>,
}

impl<B: Backend> MixedRows<B> {
    /// Rows and slots.
    pub fn assignment(&self) -> &Assignment<B> {
        &self.assignment
    }
}

impl<B: Backend> AdapterBank<B> {
    /// An empty bank for all layers of a model; factors are stored as its weights are.
    ///
    /// Memory: `slots · rank · (n + k)` numbers for each layer `n×k`. Errors: [`Error::Value`] unless there is a slot and the rank is at
    /// least 1; [`Error::TooLarge`], [`Error::OutOfMemory`].
    pub fn new(backend: &B, model: &impl Adaptable<B>, slots: usize, rank: usize) -> Result<Self> {
        Self::with(model, slots, |layer| Bank::new(backend, slots, rank, layer))
    }

    /// An empty bank whose factors are stored in `f32`, whatever the weights are. Errors: as those of [`new`](Self::new).
    pub fn new_f32(backend: &B, model: &impl Adaptable<B>, slots: usize, rank: usize) -> Result<Self> {
        Self::with(model, slots, |layer| Bank::new_f32(backend, slots, rank, layer))
    }

    fn with(model: &impl Adaptable<B>, slots: usize, bank: impl Fn(Shape) -> Result<Bank<B>>) -> Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        super::adaptable::distinct(model, "bank")?;
        let layer = |(name, layer): (&str, &super::Layer<B>)| {
            let bank = bank(layer.base().weight().tensor.shape()).map_err(|error| error.in_layer(name))?;
            Ok((name.to_string(), bank))
        };
        let layers = model.layers().map(layer).collect::<Result<Vec<_>>>()?;
        Error::unless(!layers.is_empty(), "bank", "model", "without layers", "a model with a layer")?;
        let (id, slots) = (NEXT.fetch_add(1, Ordering::Relaxed), (0..slots).map(|_| None).collect());
        Ok(Self { id, layers, slots, by_name: HashMap::new(), uses: 0, counts: BankCounts::default() })
    }

    /// A bank with these adapters of a model; `None` where one of them does more than add low-rank updates, where adapters are switched
    /// off, and on backends without banks.
    ///
    /// Errors: [`Error::NoSuchAdapter`]; [`Error::Value`] while an adapter is merged.
    pub(super) fn of_model(backend: &B, model: &impl Adaptable<B>, names: &[Option<&str>]) -> Result<Option<Self>> {
        let names: BTreeSet<&str> = names.iter().flatten().copied().collect();
        super::adaptable::check_unmerged(model, "predict_mixed")?;
        model.check_adapters(&names.iter().copied().collect::<Vec<_>>())?;
        let parts = || model.layers().filter_map(|(_, layer)| layer.lora());
        let plain = |name: &&str| parts().filter_map(|lora| lora.part(name)).all(|part| host::plain(part).is_ok());
        if !backend.takes_banks() || !parts().all(super::LoraLinear::is_enabled) || !names.iter().all(plain) {
            return Ok(None);
        }
        let ranks = names.iter().flat_map(|name| model.adapters(name)).map(|(_, adapter)| adapter.config().rank);
        let mut bank = Self::new(backend, model, names.len().max(1), ranks.max().unwrap_or(1))?;
        for name in names {
            bank.load(backend, name, &HostAdapter::of_model(backend, model, name)?)?;
        }
        Ok(Some(bank))
    }

    /// The number of adapters that fit into the bank.
    pub fn slots(&self) -> usize {
        self.slots.len()
    }

    /// The largest rank of an adapter.
    pub fn rank(&self) -> usize {
        self.layers.first().map_or(0, |(_, bank)| bank.rank())
    }

    /// The bank of a layer.
    pub fn layer(&self, name: &str) -> Option<&Bank<B>> {
        self.layers.iter().find(|(known, _)| known == name).map(|(_, bank)| bank)
    }

    /// The adapters that are in a slot, in the order of their slots.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.slots.iter().flatten().map(|occupant| occupant.name.as_str())
    }

    /// The slot of an adapter, if it is in one.
    pub fn slot(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    /// Hits, loads and evictions so far.
    pub fn counts(&self) -> BankCounts {
        self.counts
    }

    /// Puts an adapter into a slot: its own if it is in one already, a free one, or that of the adapter which was used the longest ago.
    ///
    /// Errors: [`Error::NoSuchLayer`] for a layer that the model does not have; [`Error::InLayer`] for a rank above the bank's and for
    /// factors that do not fit the layer; [`Error::Value`] if it is in use, or every slot is in use or pinned; [`Error::OutOfMemory`].
    /// Nothing is changed unless memory was lacking, which leaves the slot empty.
    pub fn load(&mut self, backend: &B, name: &str, adapter: &HostAdapter) -> Result<usize> {
        self.load_beside(backend, name, adapter, &BTreeSet::new())
    }

    /// [`load`](Self::load) that does not evict the adapters in these slots.
    fn load_beside(&mut self, backend: &B, name: &str, adapter: &HostAdapter, kept: &BTreeSet<usize>) -> Result<usize> {
        adapter.check(&self.layers)?;
        let slot = self.slot_for(name, kept)?;
        self.empty(backend, slot)?;
        for (layer, bank) in &mut self.layers {
            match adapter.updates.get(layer) {
                Some(HostUpdate { a, b, scaling }) => bank.load(backend, slot, (a, b), *scaling),
                None => bank.load_nothing(backend, slot),
            }
            .map_err(|error| error.in_layer(layer))?;
        }
        self.occupy(name, slot);
        Ok(slot)
    }

    /// The slot for an adapter that is to be loaded.
    fn slot_for(&self, name: &str, kept: &BTreeSet<usize>) -> Result<usize> {
        if let Some(slot) = self.slot(name) {
            let free = !self.slots[slot].as_ref().is_some_and(Occupant::is_in_use);
            return refused(free, "load", || format!("`{name}`, which a batch uses"), "one that no batch uses").map(|()| slot);
        }
        if let Some(free) = self.slots.iter().position(Option::is_none) {
            return Ok(free);
        }
        let may_go = |(slot, occupant): (usize, &Option<Occupant>)| {
            let occupant = occupant.as_ref().filter(|there| !there.pinned && !there.is_in_use() && !kept.contains(&slot))?;
            Some((occupant.last_use, slot))
        };
        let oldest = self.slots.iter().enumerate().filter_map(may_go).min();
        let got = || format!("`{name}`, for which there is no slot: all {} are in use or pinned", self.slots.len());
        refused(oldest.is_some(), "load", got, "one for which a slot can be emptied")?;
        Ok(oldest.map_or(0, |(_, slot)| slot))
    }

    /// Empties a slot, so that nothing half written is ever taken for an adapter.
    fn empty(&mut self, backend: &B, slot: usize) -> Result<()> {
        if let Some(old) = self.slots[slot].take() {
            self.by_name.remove(&old.name);
            self.counts.evictions += 1;
        }
        self.layers.iter_mut().try_for_each(|(_, bank)| bank.clear(backend, slot))
    }

    fn occupy(&mut self, name: &str, slot: usize) {
        self.counts.loads += 1;
        self.uses += 1;
        self.by_name.insert(name.into(), slot);
        self.slots[slot] = Some(Occupant { name: name.into(), last_use: self.uses, pinned: false, users: Arc::new(()) });
    }

    /// Takes an adapter out of its slot. Errors: [`Error::NoSuchAdapter`]; [`Error::Value`] while a batch uses it.
    pub fn evict(&mut self, backend: &B, name: &str) -> Result<()> {
        let slot = self.known(name)?;
        let free = !self.slots[slot].as_ref().is_some_and(Occupant::is_in_use);
        refused(free, "evict", || format!("`{name}`, which a batch uses"), "one that no batch uses")?;
        self.empty(backend, slot)
    }

    /// Keeps an adapter in its slot, or no longer. Errors: [`Error::NoSuchAdapter`].
    pub fn set_pinned(&mut self, name: &str, pinned: bool) -> Result<()> {
        let slot = self.known(name)?;
        self.slots[slot].iter_mut().for_each(|occupant| occupant.pinned = pinned);
        Ok(())
    }

    fn known(&self, name: &str) -> Result<usize> {
        let known = || self.names().collect::<Vec<_>>().join(", ");
        self.slot(name).ok_or_else(|| Error::NoSuchAdapter { name: name.into(), known: known() })
    }

    /// Assigns an adapter to each row of a batch; `None` is the base model. `fetch` reads an adapter that is in no slot from host memory
    /// or disk; it replaces the least recently used one.
    ///
    /// Errors: those of `fetch` and of [`load`](Self::load); [`Error::Value`] for more adapters than slots.
    pub fn assign(
        &mut self,
        backend: &B,
        rows: &[Option<&str>],
        fetch: impl FnMut(&str) -> Result<HostAdapter>,
    ) -> Result<MixedRows<B>> {
        self.assign_sequences(backend, rows, 1, fetch)
    }

    /// [`assign`](Self::assign) for a batch of sequences, each `length` rows long: one name for each.
    pub fn assign_sequences(
        &mut self,
        backend: &B,
        sequences: &[Option<&str>],
        length: usize,
        mut fetch: impl FnMut(&str) -> Result<HostAdapter>,
    ) -> Result<MixedRows<B>> {
        let names: BTreeSet<&str> = sequences.iter().flatten().copied().collect();
        let (got, most) = (|| format!("{} adapters in one batch", names.len()), self.slots.len());
        refused(names.len() <= most, "assign", got, "at most as many as there are slots")?;
        let mut kept: BTreeSet<usize> = names.iter().filter_map(|name| self.slot(name)).collect();
        self.counts.hits += kept.len() as u64;
        for name in names.iter().filter(|name| !self.by_name.contains_key(**name)).copied().collect::<Vec<_>>() {
            let adapter = fetch(name)?;
            kept.insert(self.load_beside(backend, name, &adapter, &kept)?);
        }
        self.assign_loaded(backend, sequences, length)
    }

    /// [`assign_sequences`](Self::assign_sequences) of adapters that are in a slot. Errors: [`Error::Value`] naming the one that is not,
    /// and its row.
    pub fn assign_loaded(&mut self, backend: &B, sequences: &[Option<&str>], length: usize) -> Result<MixedRows<B>> {
        let mut slots = Vec::with_capacity(sequences.len());
        for (at, name) in sequences.iter().enumerate() {
            let slot = name.map(|name| {
                let got = || format!("`{name}` in row {}, which is in no slot", at * length);
                let slot = self.slot(name);
                refused(slot.is_some(), "assign", got, "an adapter that was loaded").map(|()| slot.unwrap_or_default())
            });
            slots.push(slot.transpose()?);
        }
        let assignment = Assignment::for_sequences(backend, self.slots.len(), &slots, length)?;
        self.uses += 1;
        let mut users = Vec::new();
        for segment in assignment.segments() {
            if let Some(occupant) = &mut self.slots[segment.slot] {
                occupant.last_use = self.uses;
                users.push(occupant.users.clone());
            }
        }
        Ok(MixedRows { bank: self.id, assignment, _users: users })
    }
}

/// Errors: [`Error::Value`] about adapters, unless it holds.
fn refused(holds: bool, verb: &'static str, got: impl FnOnce() -> String, want: &'static str) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::Value { verb, name: "adapter", got: got(), want: want.into() }) }
}
