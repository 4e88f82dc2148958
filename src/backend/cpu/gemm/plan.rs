//! The plan: the regime of a sum, and its block sizes. Pure functions of the shape, the micro-kernel and the caches, with
//! BLIS's names for the blocks, after its analytical model (T. M. Low, F. D. Igual, T. M. Smith and E. S. Quintana-Orti,
//! "Analytical modeling is enough for high-performance BLIS", ACM TOMS 2016).
//!
//! The order of summation depends on the regime and on [`KC`], and these do not depend on the machine. So every CPU with fused
//! multiply-add gives the same bits.

use super::super::caches::Caches;

/// The kind of loop nest that computes a sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Regime {
    /// Both sides are packed: [`blocked`](super::blocked).
    Blocked,
    /// Few rows, the right side is not packed: [`skinny`](super::skinny).
    Skinny,
}

/// The most rows for which a K-major right side is not packed: packing it costs about as much as the dot products of 16 rows
/// (measured at 4096 × 2048 and its transpose, see `benches/RESULTS.md`).
pub(super) const DOT_ROWS: usize = 16;
/// The most rows for which an N-major right side is not packed: it is slower to pack than a K-major one, and faster to use
/// unpacked.
pub(super) const SKINNY_ROWS: usize = 24;
/// The greatest depth of the rank-k update. For a deeper one, the blocked regime is faster.
pub(super) const RANK_K_DEPTH: usize = 64;

/// The regime of an output with `rows` rows. `dots`: a right side is K-major, so that its products are dot products; `crossed`:
/// the left side of such a term is not contiguous along the depth.
pub(super) fn regime(rows: usize, dots: bool, crossed: bool) -> Regime {
    let most = if dots { DOT_ROWS } else { SKINNY_ROWS };
    if rows <= most && !crossed { Regime::Skinny } else { Regime::Blocked }
}

/// The most sums of a skinny task over an N-major right side (20 KiB): they stay in L1.
pub(super) const AXPY_SUMS: usize = 5 * 1024;
/// Columns of the output in a skinny task of dot products: each is a row of the weight.
pub(super) const DOT_COLS: usize = 64;
/// Rows of the left side whose dot products are computed at the same time, on a unit whose registers hold `registers` vectors:
/// 5·4 sums and 4 weights in 32 registers, 2·3 sums in 8.
pub(super) fn dot_rows(registers: usize, rows: usize) -> usize {
    match registers {
        _ if rows <= 1 => 1,
        32.. => 5,
        _ => 2,
    }
}

/// The most columns of a skinny task over an N-major right side: as many as have their sums in L1, since long contiguous runs
/// suit hardware prefetching. With AVX-512 at most 512, since runs of 2 KiB of `f32` were fastest on a Xeon.
pub(super) fn axpy_cols(registers: usize, rows: usize, cols: usize, threads: usize) -> usize {
    let (most, tasks) = if registers >= 32 { (512, 1) } else { (AXPY_SUMS, if threads > 1 { 2 * threads } else { 1 }) };
    most.min(AXPY_SUMS / rows.max(1)).min(cols.div_ceil(tasks))
}

/// Rows of an N-major right side (steps of the depth) that are added up in one pass over the sums, so that a sum that is loaded
/// is used 16 times. For one row of the output, loading sums is cheap, and eight streams of weights are faster than sixteen
/// (measured on Zen 3).
pub(super) fn axpy_depth(registers: usize, rows: usize) -> usize {
    if registers >= 32 || rows > 1 { STREAMS } else { STREAMS / 2 }
}

/// The most rows in one pass: one for each stream that hardware prefetches.
pub(super) const STREAMS: usize = 16;

/// True if dot products prefetch the next rows of the weight. It helps where arithmetic takes as long as reading. On Zen 3, 10
/// rows gain a sixth, and fewer than 6 lose 5 to 20 %; on a Xeon with AVX-512 it costs a fifth.
pub(super) fn prefetch_in_dots(registers: usize, rows: usize) -> bool {
    registers < 32 && rows > 6
}

/// True if dot products widen 16-bit weights before they multiply: the registers take two rows at a time, so more rows would widen the
/// same weights again. On Zen 3, in single runs, 10 and 16 rows gained up to a sixth, and 4 rows lost a quarter.
pub(super) fn widen_before_dots(registers: usize, rows: usize) -> bool {
    registers < 32 && rows > 8
}

/// True if the skinny regime prefetches the next rows of an N-major right side. On Zen 3, 3 to 10 rows gain 6 to 24 %, 16 rows
/// up to 10 %; one row loses 14 %, 20 rows lose 4 %.
pub(super) fn prefetch_in_axpy(registers: usize, rows: usize) -> bool {
    registers < 32 && (2..=16).contains(&rows)
}

/// Columns of a quantised weight in a task of the skinny regime, and steps of its depth, that are dequantised for a few rows of the weight
/// at a time (16 KiB): they stay in L1.
pub(super) const QUANTISED_COLS: usize = 512;
pub(super) const QUANTISED_DEPTH: usize = 512;

/// Rows of the output in a task of the rank-k update; each panel of the right side is used for all of them.
pub(super) const RANK_K_ROWS: usize = 64;
/// Numbers of the right side in a task of the rank-k update (512 KiB): they stay in L2.
pub(super) const RANK_K_RHS: usize = 128 * 1024;
/// Vectors ahead that the rank-k update prefetches its output.
pub(super) const RANK_K_AHEAD: usize = 16;

/// True if the rank-k update prefetches an output of `bytes`. On Zen 3, with four rows at a time, this makes an output that is
/// likely in L3 a fifth faster, and one in memory a fifth slower.
pub(super) fn prefetch_in_rank_k(registers: usize, bytes: usize, caches: Caches) -> bool {
    registers >= 32 || bytes <= caches.l3 / 8
}

/// KC, the most depth of a block of `f32`. Adding a tile to the output costs about as much as 10 steps of the depth.
pub(super) const KC: usize = 512;
/// KC of `bf16` pairs: blocks of as many bytes as those of `f32`. Not measured on such hardware.
pub(super) const KC_PAIRS: usize = 1024;
/// The greatest depth of a term that joins the last block of the term before it. In a block of less depth, a tile is done
/// before its part of the output could arrive from memory.
pub(super) const SHORT_DEPTH: usize = 128;

/// Rows of the left side that are packed at a time: 16 MiB at a depth of 4096. Each packed right panel is used for all of them.
pub(super) const LHS_ROWS: usize = 1008;
/// Rows of a task, where the columns make fewer strips than there are threads.
const TASK_ROWS: usize = 84;
/// The most bytes of a strip of the right side: 256 columns of a full block.
const STRIP_BYTES: usize = 512 << 10;

/// The block sizes of the blocked regime. Its loops, from the outermost: strips of `nc` columns, one task each; blocks of the
/// depth; `mc` rows; panels of `nr` columns; panels of `mr` rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Blocks {
    /// Rows of a tile.
    pub(super) mr: usize,
    /// Columns of a tile.
    pub(super) nr: usize,
    /// Rows whose left panels are used with one right panel before the next right panel.
    pub(super) mc: usize,
    /// The most columns of a strip, which one task packs.
    pub(super) nc: usize,
}

impl Blocks {
    /// Block sizes for tiles of `mr × nr` numbers of `bytes` each and depth blocks of at most `kc`, the deepest of which has
    /// `depth`.
    ///
    /// A tile reads `mr + nr` numbers for each step of the depth, and `nr` is the larger. So if a right panel fits in L1, it
    /// stays there while the left panels of `mc` rows stream by from L2, a quarter of which they take. The strip of the right
    /// side is read once for `mc` rows: it may fill L2, or come from L3.
    ///
    /// If a right panel does not fit in L1, a left panel stays there (`mc = mr`), and for each left panel all right panels of
    /// the strip stream by from L2, half of which they take.
    pub(super) fn new((mr, nr): (usize, usize), bytes: usize, kc: usize, depth: usize, caches: Caches) -> Self {
        let (mc, near) =
            if nr * kc * bytes <= caches.l1 { (caches.l2 / 4 / (kc * bytes) / mr * mr, caches.l2) } else { (mr, caches.l2 / 2) };
        // The less depth, the wider the strip: rows of the output are then read and written in long runs.
        let nc = near.min(STRIP_BYTES) / bytes / depth.max(1);
        Self { mr, nr, mc: mc.max(mr), nc }
    }

    /// MC of a block of this depth. With little depth it is `mr`, so that the output is written in long runs.
    #[inline(always)]
    pub(super) fn mc(&self, depth: usize) -> usize {
        if depth < SHORT_DEPTH { self.mr } else { self.mc }
    }

    /// The most rows of a task, if the columns make `strips` strips.
    pub(super) fn rows(strips: usize, threads: usize) -> usize {
        if strips < threads { TASK_ROWS } else { LHS_ROWS }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AVX512: (usize, usize) = (14, 32);
    const AVX2: (usize, usize) = (6, 16);

    fn caches(l1: usize, l2: usize, l3: usize) -> Caches {
        Caches { l1: l1 << 10, l2: l2 << 10, l3: l3 << 10 }
    }

    /// `(mc, nc)` of full blocks.
    fn cut(tile: (usize, usize), caches: Caches) -> (usize, usize) {
        let Blocks { mr, nr, mc, nc } = Blocks::new(tile, 4, KC, KC, caches);
        assert!((mr, nr) == tile && mc.is_multiple_of(mr));
        (mc, nc)
    }

    /// On AVX-512 a left panel stays in L1, and 256 columns in L2, as measured on a Xeon with 1 MiB of it.
    #[test]
    fn blocks_suit_the_caches() {
        assert_eq!(cut(AVX512, caches(32, 1024, 36 << 10)), (14, 256), "Skylake-X");
        assert_eq!(cut(AVX512, caches(48, 2048, 36 << 10)), (14, 256), "Sapphire Rapids");
        assert_eq!(cut(AVX512, caches(32, 1024, 32 << 10)), (14, 256), "Zen 4");
        assert_eq!(cut(AVX512, caches(48, 512, 8 << 10)), (14, 128), "Ice Lake");
        assert_eq!(cut(AVX2, caches(32, 512, 32 << 10)), (60, 256), "Zen 3");
        assert_eq!(cut(AVX2, caches(32, 256, 8 << 10)), (30, 128), "Haswell");
        assert_eq!(cut(AVX2, caches(48, 2048, 30 << 10)), (252, 256), "Raptor Lake");
        assert_eq!(cut(AVX2, caches(24, 512, 4 << 10)), (6, 128), "an L1 that a right panel does not fit");
        assert_eq!(cut(AVX2, caches(64, 1024, 32 << 10)), (126, 256), "Neoverse N1, NEON");
        assert_eq!(cut(AVX2, caches(128, 12 << 10, 12 << 10)), (1536, 256), "Apple M1, NEON");
    }

    #[test]
    fn skinny_blocks_fit_the_registers() {
        assert_eq!([1, 2, 10].map(|rows| dot_rows(32, rows)), [1, 5, 5]);
        assert_eq!([1, 2, 10].map(|rows| dot_rows(8, rows)), [1, 2, 2]);
        assert_eq!(
            [(1, 1), (10, 1), (24, 1), (1, 4)].map(|(rows, threads)| axpy_cols(32, rows, 4096, threads)),
            [512, 512, 213, 512]
        );
        assert_eq!(
            [(1, 1), (10, 1), (24, 1), (1, 4)].map(|(rows, threads)| axpy_cols(8, rows, 4096, threads)),
            [4096, 512, 213, 512]
        );
        assert_eq!([(32, 1), (32, 10), (8, 1), (8, 10)].map(|(registers, rows)| axpy_depth(registers, rows)), [16, 16, 8, 16]);
    }

    #[test]
    fn blocks_of_little_depth_are_wide() {
        for depth in [1, 16, SHORT_DEPTH - 1, SHORT_DEPTH, KC] {
            let blocks = Blocks::new(AVX512, 4, KC, depth, caches(32, 1024, 36 << 10));
            assert_eq!((blocks.mc(depth), blocks.nc), (14, (128 << 10) / depth));
            let blocks = Blocks::new(AVX2, 4, KC, depth, caches(32, 512, 32 << 10));
            assert_eq!((blocks.mc(depth), blocks.nc), (if depth < SHORT_DEPTH { 6 } else { 60 }, (128 << 10) / depth));
        }
        assert_eq!((Blocks::rows(1, 2), Blocks::rows(2, 2)), (TASK_ROWS, LHS_ROWS));
    }

    #[test]
    fn many_rows_and_crossed_operands_are_packed() {
        assert_eq!(regime(SKINNY_ROWS, false, false), Regime::Skinny);
        assert_eq!(regime(SKINNY_ROWS + 1, false, false), Regime::Blocked);
        assert_eq!(regime(DOT_ROWS, true, false), Regime::Skinny);
        assert_eq!(regime(DOT_ROWS + 1, true, false), Regime::Blocked);
        assert_eq!(regime(1, true, true), Regime::Blocked);
    }
}
