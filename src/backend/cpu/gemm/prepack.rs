//! A right side that stays packed: a frozen weight, which is packed once and not each time it is used.

use std::any::TypeId;
use std::ops::Range;

use rayon::prelude::*;

use super::super::Engine;
use super::super::buffer::Buffer;
use super::super::pointwise::ConvertChunk;
use super::depth::Depth;
use super::micro::{Fma, Micro};
use super::pack::{Panels, Side};
use super::{Factor, Matrix, Product, bf16_pairs};
use crate::element::{Element, Float};
use crate::error::Result;

/// Panels that a task packs.
const GROUP: usize = 2;

/// A weight packed into panels: those of `W`, the right side of `dy·W`, and those of `Wᵀ`, the right side of `x·Wᵀ`.
pub struct PackedWeight {
    as_is: Option<PrepackedPanels>,
    turned: Option<PrepackedPanels>,
}

impl PackedWeight {
    /// Packs `w` as the right side of `x·Wᵀ`, and for `backward` as that of `dy·W`. Each takes the memory of `w` again, but for
    /// edges.
    pub(in super::super) fn new<E: Float>(engine: &Engine, w: Matrix<'_, E>, backward: bool) -> Result<Self> {
        let as_is = if backward { Some(PrepackedPanels::new(engine, w)?) } else { None };
        Ok(Self { as_is, turned: Some(PrepackedPanels::new(engine, w.t())?) })
    }

    pub(super) fn of(&self, turned: bool) -> Option<&PrepackedPanels> {
        if turned { self.turned.as_ref() } else { self.as_is.as_ref() }
    }
}

/// All panels of a right side: for each block of the depth, one after another, of numbers as they are stored.
pub(super) struct PrepackedPanels {
    numbers: Buffer<f32>,
    /// Columns of a panel, and steps of depth that lie together: whose panels they are.
    nr: usize,
    step: usize,
}

impl PrepackedPanels {
    fn new<E: Float>(engine: &Engine, right: Matrix<'_, E>) -> Result<Self> {
        match (bf16_pairs::unit(engine), right.as_bf16()) {
            (Some(unit), Some(right)) => Self::pack(engine, unit, right),
            _ => Self::pack(engine, Fma, right),
        }
    }

    fn pack<E: Float, M: Micro>(engine: &Engine, micro: M, right: Matrix<'_, E>) -> Result<Self> {
        if right.data.is_empty() {
            return Ok(Self { numbers: Buffer::zeros(engine.pool, 0)?, nr: 0, step: 0 }); // its other side may be any number
        }
        let (depth, (_, nr)) = (Depth::new::<M>(right.rows, 0), micro.shape(engine.unit, right.cols));
        let cols = right.cols.next_multiple_of(nr);
        let mut numbers = Buffer::zeros(engine.pool, (cols * depth.total() * size_of::<E>()).div_ceil(size_of::<f32>()))?;
        // The left side only says how deep the product is.
        let terms = &[Product { scale: 1.0, lhs: Factor::Elem(right.t()), rhs: Factor::Elem(right) }];
        let stored: &mut [E] = bytemuck::cast_slice_mut(&mut numbers);
        for block in depth.blocks() {
            let stride = nr * block.len();
            let panels = &mut stored[cols * block.start..][..cols * block.len()];
            engine.try_each(panels.par_chunks_mut(GROUP * stride).enumerate(), |(group, kept)| {
                let (first, depth) = (group * GROUP * nr, block.clone());
                let pack = |to| engine.unit.run(Panels { micro, side: Side::Right, terms, depth, first, width: nr, stride, to });
                if same::<E, M::Number>() {
                    pack(bytemuck::cast_slice_mut(kept));
                } else {
                    let mut wide = engine.scratch.take(kept.len())?;
                    pack(bytemuck::cast_slice_mut(&mut wide));
                    engine.unit.run(ConvertChunk { from: &wide, to: kept });
                }
                Ok(())
            })?;
        }
        Ok(Self { numbers, nr, step: M::STEP })
    }
}

/// The first term's panels of some columns in one block of the depth, if they are kept as `M` reads them.
#[inline(always)]
pub(super) fn panels<'a, E: Float, M: Micro>(
    terms: &[Product<'a, E>],
    nr: usize,
    block: &Range<usize>,
    cols: &Range<usize>,
) -> Option<&'a [E]> {
    let (Some(Product { rhs: Factor::Elem(right), scale: 1.0, .. }), depth) = (terms.first(), Depth::of::<E, M>(terms)) else {
        return None;
    };
    let kept = right.packed?.of(right.transposed).filter(|kept| kept.nr == nr && kept.step == M::STEP)?;
    let steps = block.end.min(depth.second()).checked_sub(block.start)?;
    let numbers: &[E] = bytemuck::cast_slice(&kept.numbers);
    let first = right.cols.next_multiple_of(nr) * block.start + cols.start * steps;
    numbers.get(first..first + cols.len().next_multiple_of(nr) * steps)
}

/// Whether numbers that are stored are what panels hold.
pub(super) fn same<E: Element, N: Element>() -> bool {
    TypeId::of::<E>() == TypeId::of::<N>()
}
