//! The blocked regime, after BLIS (F. G. Van Zee and R. A. van de Geijn, "BLIS: a framework for rapidly instantiating BLAS
//! functionality", ACM TOMS 2015), with the terms of the sum laid end to end along the depth:
//!
//! ```text
//! for each LHS_ROWS rows of the output
//!   pack the left side, all of its depth, into MR panels              (parallel)
//!   for each strip of NC columns                       loop 5 (jc)    (parallel)
//!     for each KC of the depth                         loop 4 (pc)
//!       pack the right side into NR panels
//!       for each MC rows                               loop 3 (ic)
//!         for each NR columns                          loop 2 (jr)
//!           for each MR rows                           loop 1 (ir)
//!             tile: registers += left panel · right panel
//! ```
//!
//! The [plan](super::plan) chooses MC and NC, and with them which panels stay in which cache.
//!
//! In BLIS all cores share the packed right side. Here each task packs the strip of the right side that it owns, into its own
//! L2. So no barrier is needed within the depth, and only the packed left side, which is smaller, moves between cores.
//!
//! A short second term (`h·Bᵀ`, of depth r) joins the last depth block of the first term, so the output is not read and written
//! a second time. The depth is cut term by term ([`Depth`]), so the sum over the base weights has the same order with an update
//! and without: with `B = 0`, `y` has the bits of the base layer.

use std::ops::Range;

use super::super::Engine;
use super::super::pointwise::ConvertChunk;
use super::super::simd::{Kernel, LANES, Lanes, Simd, Unit};
use super::bf16_pairs::Split;
use super::depth::Depth;
use super::micro::Micro;
use super::outer::Outer;
use super::pack::{Panels, Side};
use super::packed_lhs::{PackedLhs, chunks};
use super::plan::{Blocks, SHORT_DEPTH};
use super::prepack;
use super::{Block, Factor, Init, LowRank, Output, Parts, Product};
use crate::element::{DType, Float};
use crate::error::Result;

/// Tiles ahead that the output is prefetched, where the depth is short.
const TILES_AHEAD: usize = 4;

/// The largest tile of any micro-kernel, in vectors: 32 × 32 numbers.
const MAX_TILE: usize = 32 * 2;

/// `out = init + Σ scale·lhs·rhs`
pub(super) fn run<E: Float, O: Float, M: Micro>(
    engine: &Engine,
    micro: M,
    mut out: Output<'_, O>,
    init: Init<'_, E>,
    terms: &[Product<'_, E>],
) -> Result<()> {
    let depth = Depth::of::<E, M>(terms);
    let mut left = PackedLhs::new(engine, micro, out.rows(), depth)?;
    for rows in chunks(out.rows()) {
        left.pack(engine, terms, rows.start, 0..depth.total());
        strips(engine, &left, out.rows_of(rows), init, terms)?;
    }
    Ok(())
}

/// `h = a_scale·lhs·a`, `out = init + lhs·w + b_scale·h·b`: the left side is packed once, and `h` is packed behind it as more
/// depth. `on_packed` is called with each chunk of rows once it is packed.
pub(super) fn run_low_rank<E: Float, O: Float, M: Micro>(
    engine: &Engine,
    micro: M,
    mut h: Output<'_, f32>,
    mut out: Output<'_, O>,
    init: Init<'_, E>,
    op: LowRank<'_, E>,
    mut on_packed: impl FnMut(&PackedLhs<'_, M>, Range<usize>) -> Result<()>,
) -> Result<()> {
    let (m, r, base) = (h.rows(), h.cols(), op.base());
    // Panels of `bf16` cannot be scaled exactly: `h` is multiplied by `a_scale` after it is summed.
    let (scale, to_h) = if M::F32 { (1.0, op.h_product()) } else { (op.a_scale, Product { scale: 1.0, ..op.h_product() }) };
    let mut split = match op.b {
        Factor::Elem(b) if !M::F32 => Some(Split::new(engine, m, b)?),
        _ => None,
    };
    let deep = Depth::new::<M>(base.depth(), split.as_ref().map_or(r, Split::depth));
    let mut left = PackedLhs::new(engine, micro, m, deep)?;
    for rows in chunks(m) {
        left.pack(engine, &[base], rows.start, 0..deep.second());
        on_packed(&left, rows.clone())?;
        strips(engine, &left, h.rows_of(rows.clone()), Init::Zero, &[to_h])?;
        if scale != 1.0 {
            h.rows_of(rows.clone()).data().iter_mut().for_each(|h| *h *= scale);
        }
        let update = match &mut split {
            None => op.update(h.data(), m),
            Some(split) => split.update(op.b_scale, h.data(), rows.clone()),
        };
        left.pack(engine, &[base, update], rows.start, deep.second()..deep.total());
        strips(engine, &left, out.rows_of(rows), init, &[base, update])?;
    }
    Ok(())
}

/// `out = scale·lhsᵀ·rhs`
pub(super) fn run_outer<E: Float>(engine: &Engine, lhs: Factor<'_, E>, mut outer: Outer<'_>) -> Result<()> {
    let mut left = outer.allocate_lhs(engine, lhs)?;
    chunks(lhs.rows()).try_for_each(|rows| outer.pack_and_add(engine, lhs, &mut left, rows))
}

/// Loop 5: each task owns a strip of columns and packs its right side, unless that is prepacked.
fn strips<E: Float, O: Float, M: Micro>(
    engine: &Engine,
    left: &PackedLhs<'_, M>,
    out: Output<'_, O>,
    init: Init<'_, E>,
    terms: &[Product<'_, E>],
) -> Result<()> {
    let depth = Depth::of::<E, M>(terms);
    let deepest = depth.longest();
    let blocks = blocks(engine, left.micro, out.cols(), deepest);
    let threads = engine.threads();
    let across = Parts::new(out.cols(), blocks.nr, blocks.nc, threads);
    let down = Parts::new(out.rows(), blocks.mr, Blocks::rows(across.count(), threads), 1);
    let sums = if O::DTYPE == DType::F32 || depth.total() <= deepest { 0 } else { down.longest() * across.longest() };
    let len = (across.longest() * deepest * size_of::<M::Number>()).div_ceil(size_of::<f32>());
    engine.scratch.reserve(threads.min(down.count() * across.count()), len + sums)?;
    out.for_each_block(engine, down, across, depth.total(), |block| {
        let mut memory = engine.scratch.take(len + sums)?;
        let (right, sums) = memory.split_at_mut(len);
        Strip { unit: engine.unit, block, init, terms, left, right: bytemuck::cast_slice_mut(right), sums, blocks }.run();
        Ok(())
    })
}

/// The block sizes of a product with `cols` columns whose deepest depth block is `depth` deep.
fn blocks<M: Micro>(engine: &Engine, micro: M, cols: usize, depth: usize) -> Blocks {
    Blocks::new(micro.shape(engine.unit, cols), size_of::<M::Number>(), M::DEPTH, depth, engine.caches)
}

/// The block sizes of a product of depth `k` with `n` columns, as text.
pub(super) fn explain<M: Micro>(engine: &Engine, micro: M, k: usize, n: usize) -> String {
    let depth = Depth::new::<M>(k, 0).longest();
    let Blocks { mr, nr, mc, nc } = blocks(engine, micro, n, depth);
    format!("blocked: MR {mr}, NR {nr}, KC {depth}, MC {mc}, NC {nc}")
}

/// Loops 4 to 1 over one strip of the output. Packing, loops 3 to 1 and converting are separate kernels, so that each is compiled
/// once for the types that it depends on.
struct Strip<'a, 'o, E, O, M: Micro> {
    unit: Unit,
    block: Block<'o, O>,
    init: Init<'a, E>,
    terms: &'a [Product<'a, E>],
    left: &'a PackedLhs<'a, M>,
    /// Memory for the packed right side of the strip, for the deepest block.
    right: &'a mut [M::Number],
    /// Memory for `f32` sums of a 16-bit output with several depth blocks, which must not be rounded in between; otherwise empty.
    sums: &'a mut [f32],
    blocks: Blocks,
}

impl<E: Float, O: Float, M: Micro> Strip<'_, '_, E, O, M> {
    fn run(mut self) {
        let Self { unit, init, terms, left, blocks, .. } = self;
        let ready = left.micro.begin();
        let depth_loop = DepthLoop { unit, init, terms, left, ready: &ready, blocks };
        if self.sums.is_empty() {
            return depth_loop.run(&mut self.block, self.right);
        }
        let (rows, cols) = (self.block.rows(), self.block.cols());
        let sums = &mut self.sums[..rows.len() * cols.len()];
        if init.reads_output() {
            for (i, sums) in sums.chunks_exact_mut(cols.len()).enumerate() {
                unit.run(ConvertChunk { from: self.block.line(i), to: sums });
            }
        }
        let mut block = Block::over(sums, rows, cols);
        depth_loop.run(&mut block, self.right);
        for i in 0..block.rows().len() {
            unit.run(ConvertChunk { from: block.line(i), to: self.block.line(i) });
        }
    }
}

/// Loop 4 over the depth blocks of a strip.
struct DepthLoop<'a, E, M: Micro> {
    unit: Unit,
    init: Init<'a, E>,
    terms: &'a [Product<'a, E>],
    left: &'a PackedLhs<'a, M>,
    ready: &'a M::Ready,
    blocks: Blocks,
}

/// The right panels of a depth block, in two pieces along the depth, each with its number of steps: the prepacked panels of the
/// weight, and those packed for this call.
type Right<'r, N> = [(&'r [N], usize); 2];

impl<E: Float, M: Micro> DepthLoop<'_, E, M> {
    fn run<O: Float>(&self, block: &mut Block<'_, O>, memory: &mut [M::Number]) {
        let Self { unit, init, terms, left, ready, blocks } = *self;
        let depth = Depth::of::<E, M>(terms);
        let mut start = 0;
        loop {
            let within = depth.block(start);
            let right = self.pack_right(&within, &block.cols(), memory);
            let init = if start == 0 { init } else { Init::Output };
            start = within.end;
            unit.run(Tiles { ready, block, init, within, left, right, blocks });
            if start == depth.total() {
                return;
            }
        }
    }

    /// Packs a depth block of the right side, except for the part that is prepacked.
    fn pack_right<'r>(&'r self, within: &Range<usize>, cols: &Range<usize>, memory: &'r mut [M::Number]) -> Right<'r, M::Number> {
        let Self { unit, terms, left: &PackedLhs { micro, .. }, blocks: Blocks { nr, .. }, .. } = *self;
        let width = cols.len().next_multiple_of(nr);
        let prepacked = prepack::panels::<E, M>(terms, nr, within, cols).unwrap_or_default();
        let steps = prepacked.len() / width;
        let (same_type, rest) = (prepack::is_same::<E, M::Number>(), within.start + steps..within.end);
        let (widened, memory) = memory.split_at_mut(if same_type { 0 } else { prepacked.len() });
        if !same_type {
            unit.run(ConvertChunk { from: prepacked, to: bytemuck::cast_slice_mut::<M::Number, f32>(&mut *widened) });
        }
        let to = &mut memory[..width * rest.len()];
        if !rest.is_empty() {
            let (stride, depth, to) = (nr * rest.len(), rest.clone(), &mut *to);
            Panels { micro, side: Side::Right, terms, depth, first: cols.start, width: nr, stride, to }.pack(unit);
        }
        [(if same_type { bytemuck::cast_slice(prepacked) } else { widened }, steps), (to, rest.len())]
    }
}

/// Loops 3 to 1: the tiles of one depth block of a strip.
struct Tiles<'a, 'o, E, O, M: Micro> {
    ready: &'a M::Ready,
    block: &'a mut Block<'o, O>,
    init: Init<'a, E>,
    within: Range<usize>,
    left: &'a PackedLhs<'a, M>,
    right: Right<'a, M::Number>,
    blocks: Blocks,
}

impl<E: Float, O: Float, M: Micro> Kernel for Tiles<'_, '_, E, O, M> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if (S::NV == 2 || !M::F32) && self.blocks.nr == 2 * LANES { self.tiles::<S, 2>(s) } else { self.tiles::<S, 1>(s) }
    }
}

impl<E: Float, O: Float, M: Micro> Tiles<'_, '_, E, O, M> {
    /// Tiles `NV` vectors wide.
    #[inline(always)]
    fn tiles<S: Simd, const NV: usize>(self, s: S) {
        let Self { ready, block, init, within, left, right, blocks } = self;
        let (mr, nr, mc) = (blocks.mr, NV * LANES, blocks.mc(within.len()));
        let (first, height, width) = (block.rows().start / mr, block.rows().len(), block.cols().len());
        let left = left.panels(&within);
        let mut tile = [[0.0; LANES]; MAX_TILE];
        for rows in (0..height).step_by(mc).map(|ic| ic..height.min(ic + mc)) {
            for cols in (0..width).step_by(nr).map(|j| j..width.min(j + nr)) {
                let right = right.map(|(panels, steps)| &panels[cols.start * steps..][..nr * steps]);
                for i in rows.clone().step_by(mr) {
                    let rows = i..rows.end.min(i + mr);
                    prefetch_output::<S, O, NV>(s, block, rows.clone(), cols.clone(), within.len());
                    M::tile::<S, NV>(ready, s, left.panel(first + i / mr), right, &mut tile);
                    write::<S, E, O, NV>(s, block, init, rows, cols.clone(), &tile);
                }
            }
        }
    }
}

/// Prefetches the part of the output that a tile is written to. If the depth is short, the tile is done before its own part
/// arrives, so that of a later tile is prefetched.
#[inline(always)]
fn prefetch_output<S: Simd, O, const NV: usize>(
    s: S,
    block: &mut Block<'_, O>,
    rows: Range<usize>,
    cols: Range<usize>,
    depth: usize,
) {
    let ahead = if depth < SHORT_DEPTH { TILES_AHEAD * NV * LANES } else { 0 };
    for row in rows {
        for v in 0..NV {
            s.prefetch(&block.line(row)[cols.clone()], ahead + v * LANES);
        }
    }
}

/// `output = init + tile` for one tile, cut off at the edges of the block.
#[inline(always)]
fn write<S: Simd, E: Float, O: Float, const NV: usize>(
    s: S,
    block: &mut Block<'_, O>,
    init: Init<'_, E>,
    rows: Range<usize>,
    cols: Range<usize>,
    tile: &[Lanes<f32>],
) {
    let col = block.cols().start + cols.start;
    for (row, sums) in rows.zip(tile.as_chunks::<NV>().0) {
        let line = &mut block.line(row)[cols.clone()];
        match line.as_chunks_mut::<LANES>().0.first_chunk_mut::<NV>() {
            Some(line) => super::finish(s, sums, init, col, line.as_flattened_mut()), // of a length that the compiler knows
            None => super::finish(s, sums, init, col, line),
        }
    }
}
