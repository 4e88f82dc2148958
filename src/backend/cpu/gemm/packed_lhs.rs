//! The packed left side of a product, which all tasks share.

use std::ops::Range;

use rayon::prelude::*;

use super::super::Engine;
use super::super::scratch::ScratchGuard;
use super::super::small_work::SMALL_MATRIX;
use super::Product;
use super::depth::Depth;
use super::micro::Micro;
use super::pack::{Panels, Side};
use super::plan::LHS_ROWS;
use crate::element::Float;
use crate::error::Result;

/// Left panels in a task. Of a transposed left side, each step of the depth is one contiguous run for the panels of a task.
const GROUP: usize = 8;

/// The rows of the output in chunks of at most [`LHS_ROWS`].
pub(super) fn chunks(rows: usize) -> impl Iterator<Item = Range<usize>> {
    (0..rows).step_by(LHS_ROWS).map(move |start| start..rows.min(start + LHS_ROWS))
}

/// The packed left side of a chunk of rows: for each block of the depth, all panels one after another, each with `mr` numbers
/// for each step of the block.
pub(super) struct PackedLhs<'e, M> {
    pub(super) micro: M,
    numbers: ScratchGuard<'e>,
    depth: Depth,
    panels: usize,
    /// Rows of a panel.
    pub(super) mr: usize,
}

impl<'e, M: Micro> PackedLhs<'e, M> {
    /// Memory for chunks of an output with `rows` rows.
    pub(super) fn new(engine: &'e Engine, micro: M, rows: usize, depth: Depth) -> Result<Self> {
        let (mr, _) = micro.shape(engine.unit, 0);
        let panels = rows.min(LHS_ROWS).div_ceil(mr);
        Ok(Self { micro, numbers: engine.scratch.take_of::<M::Number>(panels * mr * depth.total())?, depth, panels, mr })
    }

    /// Packs the rows from `first` on, for the depth `within`.
    pub(super) fn pack<E: Float>(&mut self, engine: &Engine, terms: &[Product<'_, E>], first: usize, within: Range<usize>) {
        let (micro, mr, rows) = (self.micro, self.mr, terms.first().map_or(0, |term| term.lhs.rows()));
        let present = (rows - first).div_ceil(mr);
        for block in self.depth.blocks() {
            let depth = block.start.max(within.start)..block.end.min(within.end);
            if depth.is_empty() {
                continue;
            }
            let (stride, offset) = (mr * block.len(), mr * (depth.start - block.start));
            let panels = &mut self.numbers.as_mut::<M::Number>()[self.panels * mr * block.start..];
            let panels = &mut panels[..self.panels.min(present) * stride];
            let small = panels.len() <= SMALL_MATRIX;
            engine.sequential_if(small).each(panels.par_chunks_mut(GROUP * stride).enumerate(), |(group, to)| {
                let (first, depth) = (first + group * GROUP * mr, depth.clone());
                Panels { micro, side: Side::Left, terms, depth, first, width: mr, stride, to: &mut to[offset..] }
                    .pack(engine.unit);
            });
        }
    }

    /// The panels of a block of the depth, or of the start of one.
    #[inline(always)]
    pub(super) fn panels(&self, within: &Range<usize>) -> LhsPanels<'_, M::Number> {
        let stride = self.mr * self.depth.block(within.start).len();
        let numbers = &self.numbers.as_ref::<M::Number>()[self.panels * self.mr * within.start..];
        LhsPanels { numbers, stride, len: self.mr * within.len() }
    }

    /// The range `depth` cut at the ends of blocks.
    pub(super) fn blocks_within(&self, depth: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let part = move |block: Range<usize>| block.start.max(depth.start)..block.end.min(depth.end);
        self.depth.blocks().map(part).filter(|part| !part.is_empty())
    }

    /// Panel `i`, for a range of steps within one block.
    #[inline(always)]
    pub(super) fn panel_part(&self, i: usize, within: &Range<usize>) -> &[M::Number] {
        let mut blocks = self.depth.blocks();
        let start = blocks.find(|block| block.end > within.start).map_or(0, |block| block.start);
        &self.panels(&(start..within.end)).panel(i)[self.mr * (within.start - start)..]
    }
}

/// The left panels of a block of the depth.
pub(super) struct LhsPanels<'l, N> {
    numbers: &'l [N],
    stride: usize,
    len: usize,
}

impl<'l, N> LhsPanels<'l, N> {
    #[inline(always)]
    pub(super) fn panel(&self, i: usize) -> &'l [N] {
        &self.numbers[i * self.stride..][..self.len]
    }
}
