//! The blocked nest, after BLIS (F. G. Van Zee and R. A. van de Geijn, "BLIS: a framework for rapidly instantiating BLAS
//! functionality", ACM TOMS 2015), with the terms of the sum laid end to end along the depth:
//!
//! ```text
//! for each KC of the depth, across all terms        loop 4 (pc)
//!   pack the left side into MR panels, the right side into NR panels         (parallel)
//!   for each MC × NC block of the output            loops 3 and 5 (ic, jc)   (parallel)
//!     for each MR rows                              loop 1 (ir): the left panel, MR·KC floats, stays in L1
//!       for each NR columns                         loop 2 (jr): the right panels, NC·KC floats, stay in L2
//!         tile: registers += left panel · right panel
//! ```
//!
//! A term of the sum that is only r deep (`h·Bᵀ`) shares the last block with the end of the term before it: no second pass
//! over the output.

use std::ops::Range;

use rayon::prelude::*;

use super::super::Engine;
use super::super::pointwise::convert;
use super::super::simd::{Kernel, LANES, Simd, Unit};
use super::pack::{Panel, Side};
use super::{Block, Init, Output, Product};
use crate::element::{DType, Float};
use crate::error::Result;

/// One left panel (14·384 floats, 21 KiB) leaves room in a 32 KiB L1; fewer blocks mean fewer passes over the output.
const KC: usize = 384;
/// A block's right panels (384·384 floats, 576 KiB) stay in a 1 MiB L2.
const NC: usize = 384;
/// Rows of a block: enough for each right panel brought to L2 to be used ten times or more.
const MC: usize = 168;

/// The tallest and the widest tile of any unit, in rows and vectors.
const MAX_TILE: usize = 14 * 2;

/// `out = init + Σ scale·lhs·rhs`
pub(super) fn run<E: Float, O: Float>(
    engine: &Engine,
    out: Output<'_, O>,
    init: Init<'_, E>,
    terms: &[Product<'_, E>],
) -> Result<()> {
    let depth: usize = terms.iter().map(Product::depth).sum();
    if O::DTYPE == DType::F32 || depth <= KC {
        return nest(engine, out, init, terms, depth);
    }
    // A sum over several depth blocks must not be rounded in between: it is made in `f32` beside the output.
    let mut sums = engine.scratch.take(out.data.len())?;
    if let Init::Output = init {
        convert(engine.unit, out.data, &mut sums);
    }
    nest(engine, Output::new(&mut sums, out.rows, out.cols), init, terms, depth)?;
    convert(engine.unit, &sums, out.data);
    Ok(())
}

/// Loop 4: the depth, in equal blocks of at most `KC`.
fn nest<E: Float, O: Float>(
    engine: &Engine,
    out: Output<'_, O>,
    init: Init<'_, E>,
    terms: &[Product<'_, E>],
    depth: usize,
) -> Result<()> {
    let (unit, (mr, nr)) = (engine.unit, engine.unit.run(TileShape));
    let (height, width) = (MC / mr * mr, NC / nr * nr);
    let blocks = depth.div_ceil(KC).max(1);
    let steps = depth.div_ceil(blocks);
    let mut left = engine.scratch.take(out.rows.div_ceil(mr) * mr * steps)?;
    let mut right = engine.scratch.take(out.cols.div_ceil(nr) * nr * steps)?;
    for block in 0..blocks {
        let within = depth * block / blocks..depth * (block + 1) / blocks;
        let left = pack(unit, Side::Left, terms, within.clone(), mr, &mut left);
        let right = pack(unit, Side::Right, terms, within.clone(), nr, &mut right);
        let init = if block == 0 { init } else { Init::Output };
        let whole = Output::new(&mut *out.data, out.rows, out.cols);
        let task = |block| unit.run(Tiles { block, init, depth: within.len(), left, right });
        whole.into_blocks(height, width).into_par_iter().for_each(task);
    }
    Ok(())
}

/// All panels of one side for a depth block, at the beginning of `to`, which has room for the deepest.
fn pack<'p, E: Float>(
    unit: Unit,
    side: Side,
    terms: &[Product<'_, E>],
    depth: Range<usize>,
    width: usize,
    to: &'p mut [f32],
) -> &'p [f32] {
    let lines = terms.first().map_or(0, |term| side.lines(term));
    let packed = &mut to[..lines.div_ceil(width) * width * depth.len()];
    if !packed.is_empty() {
        let panels = packed.par_chunks_mut(width * depth.len()).enumerate();
        panels.for_each(|(panel, to)| unit.run(Panel { side, terms, depth: depth.clone(), panel, width, to }));
    }
    packed
}

/// Loops 1 and 2 over one block of the output.
struct Tiles<'a, 'o, E, O> {
    block: Block<'o, O>,
    init: Init<'a, E>,
    depth: usize,
    left: &'a [f32],
    right: &'a [f32],
}

impl<E: Float, O: Float> Kernel for Tiles<'_, '_, E, O> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let (mr, nr) = (S::MR, S::NV * LANES);
        let (height, width) = (self.block.lines.len(), self.block.width());
        let mut tile = [[0.0; LANES]; MAX_TILE];
        for i in (0..height).step_by(mr) {
            let left = &self.left[(self.block.row + i) * self.depth..][..mr * self.depth];
            for j in (0..width).step_by(nr) {
                let right = &self.right[(self.block.col + j) * self.depth..][..nr * self.depth];
                s.tile(left, right, &mut tile);
                let lines = &mut self.block.lines[i..height.min(i + mr)];
                for (line, sums) in lines.iter_mut().zip(tile.chunks_exact(S::NV)) {
                    super::finish(s, sums, self.init, self.block.col + j, &mut line[j..width.min(j + nr)]);
                }
            }
        }
    }
}

/// Rows and columns of the unit's tile.
struct TileShape;

impl Kernel for TileShape {
    type Out = (usize, usize);
    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> (usize, usize) {
        (S::MR, S::NV * LANES)
    }
}
