//! Merging into one tensor of a checkpoint, block by block.
//!
//! Each block of rows is read and widened to `f32`, the update is added, and the sums are rounded once. Blocks are computed in
//! parallel, and depend only on the shape, so the result has the same bits for any number of threads.

use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

use super::change::{Change, Changed, Piece, Source};
use super::names::Place;
use crate::adapter::convert_elements;
use crate::backend::cpu::Cpu;
use crate::element::DType;
use crate::error::Result;
use crate::op::{LoraMerge, Rounding};
use crate::tensor::Tensor;

/// Elements of a block: 1 MiB of `f32`, which stays in L2 between widening and rounding.
const BLOCK: usize = 1 << 18;
/// Blocks that are computed in parallel, and then written in order.
pub(super) const BLOCKS: usize = 8;

/// Merging (`sign` 1) or unmerging (-1), the element types before and after, and whether the data for a residue is returned.
#[derive(Clone, Copy)]
pub(super) struct MergeMode {
    pub(super) sign: f32,
    pub(super) dtypes: [DType; 2],
    pub(super) keeps: bool,
}

/// A tensor that is changed, in blocks of rows.
pub(super) struct Weight<'c> {
    change: &'c Change<'c>,
    place: Place<'c>,
    mode: MergeMode,
    updates: Vec<Update>,
    gains: Gains<'c>,
    /// Buffers for blocks that are not in use. They are reused because fresh pages would cost more than the sums.
    spare: Mutex<Vec<Tensor<Cpu<f32>>>>,
}

/// An update `scale·B·A` of a range of rows, with factors in the layout of the stored tensor.
struct Update {
    rows: [usize; 2],
    scale: f32,
    a: Tensor<Cpu<f32>>,
    b: Vec<f32>,
}

/// The factors that rows or columns are multiplied by after the update, or divided by before it is subtracted (DoRA).
#[derive(Clone, Copy)]
enum Gains<'g> {
    None,
    /// The wanted norm of each row, from which its gain is computed.
    Norms(&'g [f32]),
    Rows(&'g [f32]),
    Columns(&'g [f32]),
}

/// The first row and the number of rows.
pub(super) type Block = [usize; 2];

impl<'c> Weight<'c> {
    /// `gains` are those of a residue if the tensor is unmerged, and empty if it is merged.
    pub(super) fn new(
        cpu: &Cpu<f32>,
        (change, place): (&'c Change<'c>, Place<'c>),
        mode: MergeMode,
        gains: &'c [f32],
    ) -> Result<Self> {
        let update = |piece: &Piece<'_>| {
            let [a, b] = piece.stored(place)?;
            let (scale, a) = (piece.factors.scaling, Tensor::from_slice(cpu, a.shape(), a.values())?);
            Ok(Update { rows: piece.rows(), scale, a, b: b.values().to_vec() })
        };
        let updates = change.pieces.iter().map(update).collect::<Result<_>>()?;
        let gains = match change.magnitude {
            Some(magnitude) if magnitude.of_columns && !gains.is_empty() => Gains::Columns(gains),
            Some(_) if !gains.is_empty() => Gains::Rows(gains),
            Some(magnitude) if !magnitude.of_columns && mode.sign > 0.0 => Gains::Norms(magnitude.values),
            _ => Gains::None,
        };
        Ok(Self { change, place, mode, updates, gains, spare: Mutex::default() })
    }

    /// The blocks, cut so that each update covers a block completely or not at all.
    pub(super) fn blocks(&self) -> Vec<Block> {
        let (total, most) = (self.change.elements() / self.change.cols.max(1), (BLOCK / self.change.cols.max(1)).max(1));
        let mut cuts: Vec<usize> = self.updates.iter().flat_map(|update| update.rows).chain([0, total]).collect();
        cuts.sort_unstable();
        cuts.dedup();
        let blocks = |window: &[usize]| {
            let [first, end] = [window[0], window[1]];
            (first..end).step_by(most).map(move |row| [row, most.min(end - row)])
        };
        cuts.windows(2).flat_map(blocks).collect()
    }

    pub(super) fn elements(&self, [_, rows]: Block) -> usize {
        rows * self.change.cols
    }

    /// `gain = magnitude / ‖column‖` for every column of the updated tensor; 0 for a column of zeros, which stays zero.
    pub(super) fn column_gains(&self, cpu: &Cpu<f32>) -> Result<Vec<f32>> {
        let magnitude = self.change.magnitude.filter(|magnitude| magnitude.of_columns && self.mode.sign > 0.0);
        let (Some(magnitude), Gains::None) = (magnitude, self.gains) else { return Ok(Vec::new()) };
        let mut squares = vec![0.0; self.change.cols];
        for blocks in self.blocks().chunks(BLOCKS) {
            let of = |&block: &Block| {
                let mut w = self.scratch_block(cpu, block)?;
                self.change.source.read(self.place, block[0] * self.change.cols, w.buffer_mut())?;
                self.add(cpu, block, 1.0, &mut w)?;
                let mut squares = vec![0.0; self.change.cols];
                let rows = w.buffer().chunks(self.change.cols.max(1));
                rows.for_each(|row| squares.iter_mut().zip(row).for_each(|(sum, w)| *sum += f64::from(*w).powi(2)));
                self.recycle(w);
                Ok(squares)
            };
            let parts = blocks.par_iter().map(of).collect::<Result<Vec<Vec<f64>>>>()?;
            parts.iter().for_each(|part| squares.iter_mut().zip(part).for_each(|(sum, part)| *sum += part));
        }
        let gain = |(magnitude, square): (&f32, f64)| if square == 0.0 { 0.0 } else { magnitude / square.sqrt() as f32 };
        Ok(magnitude.values.iter().zip(squares).map(gain).collect())
    }

    /// Sets the gains of the columns.
    pub(super) fn with_column_gains(self, gains: &'c [f32]) -> Self {
        if gains.is_empty() { self } else { Self { gains: Gains::Columns(gains), ..self } }
    }

    /// Computes the new bytes of a block.
    pub(super) fn update(&self, cpu: &Cpu<f32>, block: Block, mut new: Vec<u8>) -> Result<Changed> {
        let (MergeMode { sign, dtypes: [from, to], keeps }, cols) = (self.mode, self.change.cols);
        let (first, mut w) = (block[0] * cols, self.scratch_block(cpu, block)?);
        let bytes = w.buffer().len() * from.size();
        let mut gains = Vec::new();
        if sign > 0.0 {
            self.change.source.read(self.place, first, w.buffer_mut())?;
            self.add(cpu, block, 1.0, &mut w)?;
            self.replace_rows(block, w.buffer_mut());
            gains = self.gains.of(block).multiply(cols, w.buffer_mut());
        } else {
            Source::Stored.read(self.place, first, w.buffer_mut())?;
            self.subtract(cpu, block, self.gains.of(block), &mut w)?;
        }
        let finite = convert_elements::round(to, w.buffer(), &mut new);
        let kept = if keeps {
            let (shard, entry) = self.place;
            let mut back = vec![0; bytes];
            convert_elements::widen(to, &new, w.buffer_mut());
            let divided = if gains.is_empty() { self.gains.of(block) } else { Gains::Rows(&gains) };
            self.subtract(cpu, block, divided, &mut w)?;
            convert_elements::round(from, w.buffer(), &mut back);
            Some([shard.read(entry, first * from.size(), bytes)?, back])
        } else {
            None
        };
        self.recycle(w);
        Ok(Changed { first, new, finite, bytes, kept, gains })
    }

    fn subtract(&self, cpu: &Cpu<f32>, block: Block, gains: Gains<'_>, w: &mut Tensor<Cpu<f32>>) -> Result<()> {
        gains.divide(self.change.cols, w.buffer_mut());
        self.add(cpu, block, -1.0, w)
    }

    /// `w += sign·(Σ scale·B·A + scale·plus)`, summed in `f32`.
    fn add(&self, cpu: &Cpu<f32>, [first, count]: Block, sign: f32, w: &mut Tensor<Cpu<f32>>) -> Result<()> {
        for Update { rows, scale, a, b } in self.updates.iter().filter(|update| update.rows[0] <= first && first < update.rows[1])
        {
            let r = a.rows();
            let b = Tensor::from_slice(cpu, (count, r), &b[(first - rows[0]) * r..][..count * r])?;
            LoraMerge { a: a.into(), b: (&b).into(), scale: sign * scale, rounding: Rounding::Nearest, w: w.view_mut() }
                .run(cpu)?;
        }
        if let Some((scale, plus)) = self.change.plus {
            let plus = &plus[first * self.change.cols..];
            w.buffer_mut().iter_mut().zip(plus).for_each(|(value, plus)| *value += sign * scale * plus);
        }
        Ok(())
    }

    fn replace_rows(&self, [first, count]: Block, w: &mut [f32]) {
        let (Some((indices, values)), cols) = (self.change.rows, self.change.cols) else { return };
        for (index, row) in indices.iter().zip(values.chunks(cols.max(1))) {
            if (first..first + count).contains(index) {
                w[(index - first) * cols..][..cols].copy_from_slice(row);
            }
        }
    }

    fn scratch_block(&self, cpu: &Cpu<f32>, [_, count]: Block) -> Result<Tensor<Cpu<f32>>> {
        let shape = (count, self.change.cols).into();
        let fits = self.spare.lock().unwrap_or_else(PoisonError::into_inner).pop().filter(|w| w.shape() == shape);
        fits.map_or_else(|| Tensor::zeros(cpu, shape), Ok)
    }

    fn recycle(&self, w: Tensor<Cpu<f32>>) {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner).push(w);
    }
}

impl Gains<'_> {
    /// The gains of a block.
    fn of(&self, [first, count]: Block) -> Gains<'_> {
        match self {
            Gains::None => Gains::None,
            Gains::Norms(norms) => Gains::Norms(&norms[first..][..count]),
            Gains::Rows(gains) => Gains::Rows(&gains[first..][..count]),
            Gains::Columns(gains) => Gains::Columns(gains),
        }
    }

    fn divide(self, cols: usize, w: &mut [f32]) {
        let rows = w.chunks_mut(cols.max(1));
        match self {
            Gains::Rows(gains) => rows.zip(gains).for_each(|(row, gain)| row.iter_mut().for_each(|w| *w /= gain)),
            Gains::Columns(gains) => rows.for_each(|row| row.iter_mut().zip(gains).for_each(|(w, gain)| *w /= gain)),
            Gains::None | Gains::Norms(_) => {}
        }
    }

    /// `row = row · norm / ‖row‖` for each row, or `column = column · gain` for each column. Returns the gains of rows; the gain
    /// of a row of zeros is 0.
    fn multiply(self, cols: usize, w: &mut [f32]) -> Vec<f32> {
        let rows = w.chunks_mut(cols.max(1));
        match self {
            Gains::Norms(norms) => {
                let gains = rows.zip(norms).map(|(row, target)| {
                    let norm = row.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>().sqrt() as f32;
                    let gain = if norm == 0.0 { 0.0 } else { target / norm };
                    row.iter_mut().for_each(|w| *w *= gain);
                    gain
                });
                gains.collect()
            }
            Gains::Columns(gains) => {
                rows.for_each(|row| row.iter_mut().zip(gains).for_each(|(w, gain)| *w *= gain));
                Vec::new()
            }
            Gains::None | Gains::Rows(_) => Vec::new(),
        }
    }
}
