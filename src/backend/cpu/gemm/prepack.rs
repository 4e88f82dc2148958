//! Prepacked weights: a frozen weight is packed once, and not for each product.

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

/// Panels in a task.
const GROUP: usize = 2;

/// A prepacked weight: the panels of `Wᵀ`, the right side of `x·Wᵀ`, and those of `W`, the right side of `dy·W`.
pub struct PackedWeight {
    plain: Option<PrepackedPanels>,
    transposed: Option<PrepackedPanels>,
}

impl PackedWeight {
    /// Packs `w` as the right side of `x·Wᵀ`, and with `backward` also as that of `dy·W`. Each takes as much memory as `w`,
    /// rounded up to whole panels.
    pub(in super::super) fn new<E: Float>(engine: &Engine, w: Matrix<'_, E>, backward: bool) -> Result<Self> {
        let plain = if backward { Some(PrepackedPanels::new(engine, w)?) } else { None };
        Ok(Self { plain, transposed: Some(PrepackedPanels::new(engine, w.t())?) })
    }

    /// The panels of `Wᵀ`, if `transposed`, or of `W`.
    fn panels(&self, transposed: bool) -> Option<&PrepackedPanels> {
        if transposed { self.transposed.as_ref() } else { self.plain.as_ref() }
    }
}

/// All panels of a right side: for each block of the depth, one after another, in the element type of the weight.
pub(super) struct PrepackedPanels {
    numbers: Buffer<f32>,
    /// NR and `Micro::STEP` of the micro-kernel that they are packed for.
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
            return Ok(Self { numbers: Buffer::zeros(engine.pool, 0)?, nr: 0, step: 0 }); // its other dimension may be of any size
        }
        let (depth, (_, nr)) = (Depth::new::<M>(right.rows, 0), micro.shape(engine.unit, right.cols));
        let cols = right.cols.next_multiple_of(nr);
        let mut numbers = Buffer::zeros(engine.pool, (cols * depth.total() * size_of::<E>()).div_ceil(size_of::<f32>()))?;
        // Of the left side only the depth is read.
        let terms = &[Product { scale: 1.0, lhs: Factor::Elem(right.t()), rhs: Factor::Elem(right) }];
        let stored: &mut [E] = bytemuck::cast_slice_mut(&mut numbers);
        for block in depth.blocks() {
            let stride = nr * block.len();
            let panels = &mut stored[cols * block.start..][..cols * block.len()];
            engine.try_each(panels.par_chunks_mut(GROUP * stride).enumerate(), |(group, packed)| {
                let (first, depth) = (group * GROUP * nr, block.clone());
                let pack = |to| Panels { micro, side: Side::Right, terms, depth, first, width: nr, stride, to }.pack(engine.unit);
                if is_same::<E, M::Number>() {
                    pack(bytemuck::cast_slice_mut(packed));
                } else {
                    let mut widened = engine.scratch.take(packed.len())?;
                    pack(bytemuck::cast_slice_mut(&mut widened));
                    engine.unit.run(ConvertChunk { from: &widened, to: packed });
                }
                Ok(())
            })?;
        }
        Ok(Self { numbers, nr, step: M::STEP })
    }
}

/// The prepacked panels of the first term, for a range of columns in one block of the depth; `None` if there are none for `M`.
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
    let packed = right.packed?.panels(right.transposed).filter(|packed| packed.nr == nr && packed.step == M::STEP)?;
    let steps = block.end.min(depth.second()).checked_sub(block.start)?;
    let numbers: &[E] = bytemuck::cast_slice(&packed.numbers);
    let first = right.cols.next_multiple_of(nr) * block.start + cols.start * steps;
    numbers.get(first..first + cols.len().next_multiple_of(nr) * steps)
}

/// True if `E` and `N` are one type.
pub(super) fn is_same<E: Element, N: Element>() -> bool {
    TypeId::of::<E>() == TypeId::of::<N>()
}
