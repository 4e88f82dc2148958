//! A weight that an adapter updates, on its way through memory.

use std::sync::{Mutex, PoisonError};

use super::change::Changed;
use super::header::Entry;
use super::{Shard, number};
use crate::adapter::Factors;
use crate::backend::cpu::Cpu;
use crate::element::DType;
use crate::error::Result;
use crate::op::{LoraMerge, Rounding};
use crate::tensor::Tensor;

/// Elements that are merged at once: 1 MiB of `f32`, which stays in L2 from its widening to its rounding.
pub(super) const BLOCK: usize = 1 << 18;

/// A weight, in blocks of rows that do not depend on the number of threads.
pub(super) struct Weight<'f> {
    factors: &'f Factors,
    scale: f32,
    a: Tensor<Cpu<f32>>,
    dtypes: [DType; 2],
    /// Whether blocks are kept as they were, and as they come back.
    keeps: bool,
    rows: Rows<'f>,
    /// Blocks of `f32` that are not in use: fresh pages cost more than the sums.
    spare: Mutex<Vec<Tensor<Cpu<f32>>>>,
}

/// What becomes of the rows, beside the update.
#[derive(Clone, Copy)]
enum Rows<'r> {
    AsTheyCome,
    /// So long, after the update is in.
    Long(&'r [f32]),
    /// Divided by what they were multiplied with, before the update is taken out.
    Divided(&'r [f32]),
}

/// The first row, and how many.
pub(super) type Block = [usize; 2];

impl<'f> Weight<'f> {
    /// Forth with sign 1, with the rows as long as the magnitudes say; back with sign -1 and the gains they were given.
    pub(super) fn new(
        cpu: &Cpu<f32>,
        factors: &'f Factors,
        (sign, dtypes, keeps): (f32, [DType; 2], bool),
        (magnitudes, gains): (Option<&'f [f32]>, &'f [f32]),
    ) -> Result<Self> {
        let a = Tensor::from_slice(cpu, factors.a.shape(), factors.a.values())?;
        let rows = match (magnitudes, gains) {
            (Some(_), [_, ..]) => Rows::Divided(gains),
            (Some(magnitudes), []) if sign > 0.0 => Rows::Long(magnitudes),
            _ => Rows::AsTheyCome,
        };
        Ok(Self { factors, scale: sign * factors.scaling, a, dtypes, keeps, rows, spare: Mutex::default() })
    }

    pub(super) fn blocks(&self) -> Vec<Block> {
        let (n, rows) = (self.factors.b.rows(), (BLOCK / self.a.cols().max(1)).max(1));
        (0..n).step_by(rows).map(|first| [first, rows.min(n - first)]).collect()
    }

    pub(super) fn elements(&self, [_, rows]: Block) -> usize {
        rows * self.a.cols()
    }

    /// The rows of a block, changed.
    pub(super) fn update(
        &self,
        cpu: &Cpu<f32>,
        (shard, entry): (&Shard, &Entry),
        block: Block,
        mut new: Vec<u8>,
    ) -> Result<Changed> {
        let [from, to] = self.dtypes;
        let (first, len) = (block[0] * self.a.cols(), self.elements(block));
        let old = shard.read(entry, first * from.size(), len * from.size())?;
        let (finite, gains) = self.add(cpu, block, (self.scale, self.rows.of(block)), [from, to], &old, &mut new)?;
        let bytes = old.len();
        let kept = if self.keeps {
            let mut back = vec![0; bytes];
            let rows = if gains.is_empty() { Rows::AsTheyCome } else { Rows::Divided(&gains) };
            self.add(cpu, block, (-self.scale, rows), [to, from], &new, &mut back)?;
            Some((old, back))
        } else {
            None
        };
        Ok(Changed { first, new, finite, bytes, kept, gains })
    }

    /// `new = old + scale·B·A`, summed in `f32` and rounded once. Says whether all of it is finite, and what rows were multiplied with.
    fn add(
        &self,
        cpu: &Cpu<f32>,
        [first, count]: Block,
        (scale, rows): (f32, Rows<'_>),
        dtypes: [DType; 2],
        old: &[u8],
        new: &mut [u8],
    ) -> Result<(bool, Vec<f32>)> {
        let (r, shape) = (self.factors.rank(), (count, self.a.cols()).into());
        let b = Tensor::from_slice(cpu, (count, r), &self.factors.b.values()[first * r..(first + count) * r])?;
        let spare = || self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = spare().pop().filter(|w| w.shape() == shape);
        let mut w = fits.map_or_else(|| Tensor::zeros(cpu, shape), Ok)?;
        number::widen(dtypes[0], old, w.buffer_mut());
        rows.divide(w.buffer_mut());
        LoraMerge { a: (&self.a).into(), b: (&b).into(), scale, rounding: Rounding::Nearest, w: w.view_mut() }.run(cpu)?;
        let gains = rows.lengthen(w.buffer_mut());
        let finite = number::narrow(dtypes[1], w.buffer(), new);
        spare().push(w);
        Ok((finite, gains))
    }
}

impl Rows<'_> {
    /// Those of a block.
    fn of(&self, [first, count]: Block) -> Rows<'_> {
        match self {
            Rows::AsTheyCome => Rows::AsTheyCome,
            Rows::Long(magnitudes) => Rows::Long(&magnitudes[first..][..count]),
            Rows::Divided(gains) => Rows::Divided(&gains[first..][..count]),
        }
    }

    fn divide(self, w: &mut [f32]) {
        let Rows::Divided(gains) = self else { return };
        let k = (w.len() / gains.len().max(1)).max(1);
        w.chunks_mut(k).zip(gains).for_each(|(row, gain)| row.iter_mut().for_each(|w| *w /= gain));
    }

    /// `row · magnitude / ‖row‖`, for each; gives what they were multiplied with. A row of zeros has no direction, and stays zero.
    fn lengthen(self, w: &mut [f32]) -> Vec<f32> {
        let Rows::Long(magnitudes) = self else { return Vec::new() };
        let k = (w.len() / magnitudes.len().max(1)).max(1);
        let lengthened = w.chunks_mut(k).zip(magnitudes).map(|(row, magnitude)| {
            let norm = row.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>().sqrt() as f32;
            let gain = if norm == 0.0 { 0.0 } else { magnitude / norm };
            row.iter_mut().for_each(|w| *w *= gain);
            gain
        });
        lengthened.collect()
    }
}
