//! The adapters of one layer, side by side, for batches in which each row uses its own.

use super::{Assignment, Factor, finite};
use crate::DType;
use crate::backend::Backend;
use crate::element::Float;
use crate::error::{Error, Result};
use crate::tensor::{Shape, Tensor};

/// Slots for the adapters of a layer with `k` inputs and `n` outputs: `A` and `B` of all slots in one allocation each.
///
/// Every slot has room for the same rank. An adapter of a smaller rank is filled up with zeros, which take no part in sums. `B` is kept
/// transposed, `rank×n`, so that both factors are contiguous along the long side.
///
/// [`factors`](Self::factors) makes the operands of a request: each row of a batch then uses the adapter that an [`Assignment`] gives
/// it.
///
/// ```
/// use lowrank::op::{Assignment, Bank, LoraForward};
/// use lowrank::{Cpu, Tensor};
///
/// let cpu = Cpu::<f32>::new()?;
/// let mut bank = Bank::new(&cpu, 2, 1, (1, 2))?; // 2 slots, rank 1, 1 output, 2 inputs
/// bank.load(&cpu, 0, (&[1.0, 0.0], &[10.0]), 1.0)?;
/// bank.load(&cpu, 1, (&[0.0, 1.0], &[10.0]), 0.5)?;
///
/// let rows = Assignment::new(&cpu, bank.slots(), &[Some(1), None, Some(0)])?;
/// let x = Tensor::from_slice(&cpu, (3, 2), &[1.0, 2.0, 1.0, 2.0, 1.0, 2.0])?;
/// let w = Tensor::from_slice(&cpu, (1, 2), &[100.0, 0.0])?;
/// let (mut h, mut y) = (Tensor::zeros(&cpu, (3, 1))?, Tensor::zeros(&cpu, (3, 1))?);
/// let [a, b] = bank.factors(&rows);
/// let (w, bias, dropout) = (Some((&w).into()), None, None);
/// LoraForward { x: x.view(), w, bias, a, b, scale: 1.0, dropout, h: h.view_mut(), y: (&mut y).into() }.run(&cpu)?;
/// assert_eq!(y.to_vec(&cpu)?, [110.0, 100.0, 110.0]);
/// # Ok::<(), lowrank::Error>(())
/// ```
#[derive(Debug)]
pub struct Bank<B: Backend> {
    rank: usize,
    /// `n×k` of the layer.
    layer: Shape,
    numbers: Numbers<B>,
    slots: Vec<Option<Slot>>,
    /// For devices: the scaling of each slot, and its rank; 0 of an empty one.
    table: Tensor<B, f32>,
}

/// An adapter in a slot.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Slot {
    /// Its own rank, at most the bank's.
    pub rank: usize,
    /// Factor of the update: `alpha / r` in the LoRA paper.
    pub scaling: f32,
}

#[derive(Debug)]
enum Numbers<B: Backend> {
    /// `slots·rank × k` and `slots·rank × n`.
    Elem([Tensor<B>; 2]),
    F32([Tensor<B, f32>; 2]),
}

impl<B: Backend> Bank<B> {
    /// An empty bank whose factors are stored as weights are. `layer` is the shape of the weight, `n×k`.
    ///
    /// Errors: [`Error::Value`] unless there is a slot and the rank is at least 1; [`Error::TooLarge`], [`Error::OutOfMemory`].
    pub fn new(backend: &B, slots: usize, rank: usize, layer: impl Into<Shape>) -> Result<Self> {
        Self::with(backend, slots, rank, layer.into(), |rows, [k, n]| {
            Ok(Numbers::Elem([Tensor::zeros(backend, (rows, k))?, Tensor::zeros(backend, (rows, n))?]))
        })
    }

    /// An empty bank whose factors are stored in `f32`, whatever the weights are. Errors: as those of [`new`](Self::new).
    pub fn new_f32(backend: &B, slots: usize, rank: usize, layer: impl Into<Shape>) -> Result<Self> {
        Self::with(backend, slots, rank, layer.into(), |rows, [k, n]| {
            Ok(Numbers::F32([Tensor::zeros(backend, (rows, k))?, Tensor::zeros(backend, (rows, n))?]))
        })
    }

    fn with(
        backend: &B,
        slots: usize,
        rank: usize,
        layer: Shape,
        numbers: impl FnOnce(usize, [usize; 2]) -> Result<Numbers<B>>,
    ) -> Result<Self> {
        Error::unless(slots > 0, "bank", "slots", slots, "at least 1")?;
        Error::unless(rank > 0, "bank", "rank", rank, "at least 1")?;
        let rows = Shape { rows: slots, cols: rank }.elements()?;
        let numbers = numbers(rows, [layer.cols, layer.rows])?;
        Ok(Self { rank, layer, numbers, slots: vec![None; slots], table: Tensor::zeros(backend, (slots, 2))? })
    }

    /// The number of slots.
    pub fn slots(&self) -> usize {
        self.slots.len()
    }

    /// The rank that every slot has room for.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The shape of the layer's weight, `n×k`.
    pub fn layer(&self) -> Shape {
        self.layer
    }

    /// The element type of the factors.
    pub fn dtype(&self) -> DType {
        match self.numbers {
            Numbers::Elem(_) => B::Elem::DTYPE,
            Numbers::F32(_) => DType::F32,
        }
    }

    /// The adapter in a slot: `None` if the slot is empty, or not one of the bank.
    pub fn slot(&self, slot: usize) -> Option<Slot> {
        self.slots.get(slot).copied().flatten()
    }

    /// All slots.
    pub(crate) fn slot_list(&self) -> &[Option<Slot>] {
        &self.slots
    }

    /// Puts an adapter into a slot, in place of what was there: `A r×k` and `B n×r`, row by row as PEFT stores them, and what the update
    /// is multiplied with. Numbers that the bank does not hold exactly are rounded to the nearest.
    ///
    /// Errors: [`Error::Value`] for a slot that the bank does not have, a rank above the bank's, factors of different ranks, and a
    /// scaling that is not finite; [`Error::OutOfMemory`]. A slot that could not be filled is as it was.
    pub fn load<T: Float>(&mut self, backend: &B, slot: usize, (a, b): (&[T], &[T]), scaling: f32) -> Result<()> {
        let Shape { rows: n, cols: k } = self.layer;
        let rank = self.rank_of(a, b)?;
        let b: Vec<T> = (0..rank * n).map(|e| b[e % n * rank + e / n]).collect();
        self.check_load(slot, rank, scaling)?;
        match &mut self.numbers {
            Numbers::Elem(numbers) => write(backend, numbers, (slot, self.rank, rank), [(a, k), (&b, n)])?,
            Numbers::F32(numbers) => write(backend, numbers, (slot, self.rank, rank), [(a, k), (&b, n)])?,
        }
        self.set(backend, slot, Some(Slot { rank, scaling }))
    }

    /// Puts an adapter whose factors are on the device into a slot: `A r×k`, and `B` transposed, `r×n`, of the type that the bank
    /// stores.
    ///
    /// Errors: as those of [`load`](Self::load); [`Error::Shape`].
    pub(crate) fn load_parts(&mut self, backend: &B, slot: usize, parts: [&Tensor<B>; 2], scaling: f32) -> Result<()> {
        let [a, b] = parts;
        let rank = a.rows();
        super::fits("bank", "a", (rank, self.layer.cols), a.shape())?;
        super::fits("bank", "b", (rank, self.layer.rows), b.shape())?;
        self.check_load(slot, rank, scaling)?;
        let Numbers::Elem(numbers) = &mut self.numbers else {
            return Error::unless(false, "bank", "b", B::Elem::DTYPE, "f32, as the bank stores it");
        };
        for (to, from) in numbers.iter_mut().zip(parts) {
            let first = slot * self.rank;
            to.view_mut().row_range(first..first + rank)?.copy_from(backend, from.view())?;
        }
        self.set(backend, slot, Some(Slot { rank, scaling }))
    }

    /// Puts an adapter into a slot that does nothing to this layer: its rows are those of the base layer.
    ///
    /// Errors: [`Error::Value`] for a slot that the bank does not have.
    pub fn load_nothing(&mut self, backend: &B, slot: usize) -> Result<()> {
        self.has(slot)?;
        self.set(backend, slot, Some(Slot { rank: 0, scaling: 0.0 }))
    }

    /// The errors of [`load`](Self::load) that do not depend on the slot.
    pub(crate) fn check<T>(&self, a: &[T], b: &[T], scaling: f32) -> Result<()> {
        self.check_rank(self.rank_of(a, b)?)?;
        finite("bank", "scaling", scaling)
    }

    /// Empties a slot. Errors: [`Error::Value`] for one that the bank does not have.
    pub fn clear(&mut self, backend: &B, slot: usize) -> Result<()> {
        self.has(slot)?;
        self.set(backend, slot, None)
    }

    /// The factors of the adapter in a slot, in host memory, as [`load`](Self::load) takes them. Errors: [`Error::Value`] for an empty
    /// slot.
    pub fn download(&self, backend: &B, slot: usize) -> Result<(Vec<f32>, Vec<f32>)> {
        let Some(Slot { rank, .. }) = self.slot(slot) else {
            return Err(Error::Value { verb: "bank", name: "slot", got: format!("{slot}, which is empty"), want: FILLED.into() });
        };
        let [a, b] = match &self.numbers {
            Numbers::Elem(numbers) => read(backend, numbers, slot * self.rank, rank)?,
            Numbers::F32(numbers) => read(backend, numbers, slot * self.rank, rank)?,
        };
        let n = self.layer.rows;
        Ok((a, (0..rank * n).map(|e| b[e % rank * n + e / rank]).collect()))
    }

    /// `A` and `B` of a request in which each row of the batch uses the adapter of its slot.
    pub fn factors<'t>(&'t self, rows: &'t Assignment<B>) -> [Factor<'t, B>; 2] {
        [Side::A, Side::B].map(|side| Factor::PerRow(PerRow { bank: self, rows, side }))
    }

    /// `slots×2`: the scaling of each slot, and its rank.
    #[allow(dead_code, reason = "for backends on GPUs")]
    pub(crate) fn table(&self) -> &Tensor<B, f32> {
        &self.table
    }

    /// The rank of factors that fit the layer.
    fn rank_of<T>(&self, a: &[T], b: &[T]) -> Result<usize> {
        let Shape { rows: n, cols: k } = self.layer;
        // Of a layer with nothing on both sides factors do not tell.
        let rank = a.len().checked_div(k).or(b.len().checked_div(n)).unwrap_or(self.rank);
        if a.len() == rank * k && b.len() == rank * n {
            return Ok(rank);
        }
        let got = format!("{} elements, and `b` {}", a.len(), b.len());
        Err(Error::Value { verb: "bank", name: "a", got, want: format!("{k}·r, and {n}·r, of one rank r").into() })
    }

    fn check_load(&self, slot: usize, rank: usize, scaling: f32) -> Result<()> {
        self.has(slot)?;
        self.check_rank(rank)?;
        finite("bank", "scaling", scaling)
    }

    fn check_rank(&self, rank: usize) -> Result<()> {
        if rank == 0 || rank > self.rank {
            let want = format!("at least 1, and at most {}, as the bank has room for", self.rank).into();
            return Err(Error::Value { verb: "bank", name: "rank", got: rank.to_string(), want });
        }
        Ok(())
    }

    fn has(&self, slot: usize) -> Result<()> {
        let got = || format!("{slot}, of {} slots", self.slots.len());
        if slot < self.slots.len() {
            return Ok(());
        }
        Err(Error::Value { verb: "bank", name: "slot", got: got(), want: "below the number of slots".into() })
    }

    fn set(&mut self, backend: &B, slot: usize, what: Option<Slot>) -> Result<()> {
        self.slots[slot] = what;
        let entry = |slot: &Option<Slot>| slot.map_or([0.0; 2], |Slot { rank, scaling }| [scaling, rank as f32]);
        let table: Vec<f32> = self.slots.iter().flat_map(entry).collect();
        self.table.copy_from_slice(backend, &table)
    }
}

/// The end of errors about empty slots.
const FILLED: &str = "a slot that an adapter was loaded into";

/// Overwrites the beginning of a slot of rank `room`: `A r×k`, and `B` transposed.
fn write<B: Backend, T: Float, S: Float>(
    backend: &B,
    numbers: &mut [Tensor<B, S>; 2],
    (slot, room, rank): (usize, usize, usize),
    parts: [(&[T], usize); 2],
) -> Result<()> {
    let stored = parts.map(|(part, cols)| {
        let part: Vec<S> = part.iter().map(|number| S::from_f32(number.to_f32())).collect();
        Tensor::from_slice(backend, (rank, cols), &part)
    });
    let [a, b] = stored;
    for (to, from) in numbers.iter_mut().zip([a?, b?]) {
        let first = slot * room;
        to.view_mut().row_range(first..first + rank)?.copy_from(backend, from.view())?;
    }
    Ok(())
}

/// `rank` rows of both factors, from `first` on.
fn read<B: Backend, S: Float>(backend: &B, numbers: &[Tensor<B, S>; 2], first: usize, rank: usize) -> Result<[Vec<f32>; 2]> {
    let [a, b] = numbers.each_ref().map(|from| {
        let mut part = Tensor::<B, S>::zeros(backend, (rank, from.cols()))?;
        part.view_mut().copy_from(backend, from.view().row_range(first..first + rank)?)?;
        Ok(part.to_vec(backend)?.into_iter().map(Float::to_f32).collect())
    });
    Ok([a?, b?])
}

/// One of the two factors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    A,
    B,
}

/// A factor of the update of a batch in which each row uses an adapter of its own: made by [`Bank::factors`].
pub struct PerRow<'t, B: Backend> {
    bank: &'t Bank<B>,
    rows: &'t Assignment<B>,
    side: Side,
}

impl<B: Backend> Clone for PerRow<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for PerRow<'_, B> {}

impl<'t, B: Backend> PerRow<'t, B> {
    /// The adapters.
    pub fn bank(&self) -> &'t Bank<B> {
        self.bank
    }

    /// The slot of each row.
    pub fn rows(&self) -> &'t Assignment<B> {
        self.rows
    }

    /// The factors of all slots, one after another: `slots·r × k`, or `slots·r × n`.
    pub(crate) fn stacked(&self) -> Factor<'t, B> {
        let at = self.side as usize;
        match &self.bank.numbers {
            Numbers::Elem(numbers) => Factor::Elem(numbers[at].view()),
            Numbers::F32(numbers) => Factor::F32(numbers[at].view()),
        }
    }

    /// The shape of the factor of one adapter, with the rank of the bank: `r×k` or `n×r`.
    pub(super) fn shape(&self) -> Shape {
        let Shape { rows: n, cols: k } = self.bank.layer;
        match self.side {
            Side::A => (self.bank.rank, k).into(),
            Side::B => (n, self.bank.rank).into(),
        }
    }

    /// Errors: [`Error::Value`] unless there is a slot, or none, for each of `m` rows, and each slot that takes part holds an adapter.
    fn check(&self, verb: &'static str, m: usize) -> Result<()> {
        let refused = |got: String, want: String| Err(Error::Value { verb, name: "rows", got, want: want.into() });
        if self.rows.rows() != m {
            return refused(format!("an assignment of {} rows", self.rows.rows()), format!("one of {m}, as `x` has"));
        }
        for segment in self.rows.segments() {
            if self.bank.slot(segment.slot).is_none() {
                let row = self.rows.rows_of(segment).first().copied().unwrap_or_default();
                let there = if segment.slot < self.bank.slots() { "is empty" } else { "the bank does not have" };
                return refused(format!("slot {} in row {row}, which {there}", segment.slot), FILLED.into());
            }
        }
        Ok(())
    }
}

/// The number of segments of factors for each row; `None` for the factors of one adapter.
///
/// Errors: [`Error::Value`] for factors of which only one is for each row, or both are of different banks or assignments; those of
/// [`PerRow::check`].
pub(super) fn check_per_row<B: Backend>(
    verb: &'static str,
    a: Factor<'_, B>,
    b: Factor<'_, B>,
    m: usize,
) -> Result<Option<usize>> {
    match (a, b) {
        (Factor::PerRow(a), Factor::PerRow(b)) => {
            let same = std::ptr::eq(a.bank, b.bank) && std::ptr::eq(a.rows, b.rows) && (a.side, b.side) == (Side::A, Side::B);
            Error::unless(
                same,
                verb,
                "b",
                "not the other factor of the bank and the rows of `a`",
                "both as `Bank::factors` made them",
            )?;
            a.check(verb, m)?;
            Ok(Some(a.rows.segments().len()))
        }
        (Factor::PerRow(_), _) => {
            Error::unless(false, verb, "b", "one for all rows", "one for each row, as `a` is").map(|()| None)
        }
        (_, Factor::PerRow(_)) => {
            Error::unless(false, verb, "a", "one for all rows", "one for each row, as `b` is").map(|()| None)
        }
        _ => Ok(None),
    }
}

/// Errors: [`Error::Value`] for a factor that differs from row to row: for verbs that change weights, or measure them.
pub(super) fn one_for_all<B: Backend>(verb: &'static str, name: &'static str, factor: Factor<'_, B>) -> Result<()> {
    let one = !matches!(factor, Factor::PerRow(_));
    Error::unless(one, verb, name, "a factor for each row", "the factor of one adapter")
}
