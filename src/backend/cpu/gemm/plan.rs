//! The plan: which loop nest computes a sum, and how it is cut into blocks. Pure functions of the shape, the micro-kernel and the
//! caches, with BLIS's names for the blocks, after its analytical model (T. M. Low, F. D. Igual, T. M. Smith and
//! E. S. Quintana-Orti, "Analytical modeling is enough for high-performance BLIS", ACM TOMS 2016).
//!
//! What decides the order of summation, [`KC`] and the regime, does not depend on the machine: every CPU with fused
//! multiply-add gives the same bits.

use super::super::caches::Caches;

/// Which loop nest computes a sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Regime {
    /// Both sides are packed: [`blocked`](super::blocked).
    Blocked,
    /// Few rows: [`skinny`](super::skinny).
    Skinny,
}

/// The most rows that are cheaper without packing (measured at 4096 × 2048 and its transpose, see `benches/RESULTS.md`): packing
/// a right side that is contiguous along the depth costs about as much as sixteen rows of dot products.
pub(super) const DOT_ROWS: usize = 16;
/// The same for a right side that is contiguous along the output: it is slower to pack, and quicker to use as it is.
pub(super) const SKINNY_ROWS: usize = 24;
/// The most depth of an update in the shallow nest: beyond, sums are better kept in the tiles of the blocked one.
pub(super) const RANK_K_DEPTH: usize = 64;

/// For an output of so many rows. `dots`: a right side is contiguous along the depth, which makes dot products; `crossed`: its left
/// side is not.
pub(super) fn regime(rows: usize, dots: bool, crossed: bool) -> Regime {
    let most = if dots { DOT_ROWS } else { SKINNY_ROWS };
    if rows <= most && !crossed { Regime::Skinny } else { Regime::Blocked }
}

/// Numbers of a skinny task's sums where the weights are contiguous along the columns (20 KiB): they stay in L1.
pub(super) const SUMS: usize = 5 * 1024;
/// Columns that a skinny task owns where each is a row of the weights, to be read whole.
pub(super) const DOTS: usize = 64;
/// Rows of the left side whose dot products are made together, in vectors of a unit that holds so many: 5·4 sums and 4 weights
/// leave room in 32, 2·3 sums leave two of eight.
pub(super) fn together(registers: usize, rows: usize) -> usize {
    match registers {
        _ if rows <= 1 => 1,
        32.. => 5,
        _ => 2,
    }
}

/// The most columns that a skinny task owns where the weights are contiguous along them: as many as L1 has room for, since hardware
/// that fetches ahead likes long runs. With AVX-512, runs of 2 KiB, as was measured on a Xeon.
pub(super) fn run(registers: usize, rows: usize, cols: usize, threads: usize) -> usize {
    let (most, tasks) = if registers >= 32 { (512, 1) } else { (SUMS, if threads > 1 { 2 * threads } else { 1 }) };
    most.min(SUMS / rows.max(1)).min(cols.div_ceil(tasks))
}

/// Rows of weights that the skinny nest reads side by side. Each sum that is loaded is used as often; one row of sums is little to
/// load, and eight streams come faster than sixteen (measured on Zen 3).
pub(super) fn streams(registers: usize, rows: usize) -> usize {
    if registers >= 32 || rows > 1 { STREAMS } else { STREAMS / 2 }
}

/// The most of them: as many as hardware fetches ahead in.
pub(super) const STREAMS: usize = 16;

/// Whether dot products ask for the lines of weights that come next. It pays where arithmetic takes as long as reading: measured on
/// Zen 3, where 10 rows gain a sixth, and fewer than 6 lose 5 to 20 %; on a Xeon with AVX-512 it costs a fifth.
pub(super) fn ask_for_dots(registers: usize, rows: usize) -> bool {
    registers < 32 && rows > 6
}

/// The same for rows of weights that are added up: 3 to 10 rows gain 6 to 24 %, 16 up to 10 %; one loses 14 %, 20 lose 4 %.
pub(super) fn ask_for_lines(registers: usize, rows: usize) -> bool {
    registers < 32 && (2..=16).contains(&rows)
}

/// Columns of a quantised weight that a skinny task owns, and the most depth, widened for a few lines at a time (16 KiB): they stay in L1.
pub(super) const QUANTISED_COLS: usize = 512;
pub(super) const QUANTISED_DEPTH: usize = 512;

/// Rows that a task of the shallow nest takes, so that what it has of the right side is used often.
pub(super) const BAND: usize = 64;
/// Numbers of the right side that stay in L2 there (512 KiB).
pub(super) const RANK_K_NEAR: usize = 128 * 1024;
/// Vectors ahead that it asks for its output.
pub(super) const AHEAD: usize = 16;

/// Whether it asks, for an output of so many bytes. On Zen 3, with four rows side by side, one that is likely in L3 comes a fifth sooner
/// so, and one that comes from memory a fifth later.
pub(super) fn ask_for_output(registers: usize, bytes: usize, caches: Caches) -> bool {
    registers >= 32 || bytes <= caches.l3 / 8
}

/// KC, the depth of a block, in `f32`. Adding a tile to the output costs about as much as 10 steps of depth.
pub(super) const KC: usize = 512;
/// KC where `bf16` are multiplied by pairs: a block of as many bytes. Not measured: no CPU here has such a unit.
pub(super) const KC_PAIRS: usize = 1024;
/// The most that a term may be deep to share a block with the term before it. Also where a tile is done before the lines of the
/// output that it is added to could come from memory.
pub(super) const SHORT: usize = 128;

/// Rows of the left side that are packed at a time: 16 MiB at a depth of 4096. Each right panel that is packed is used for as
/// many.
pub(super) const ROWS: usize = 1008;
/// Rows a task has, where there are too few columns for every thread to own some.
const FEW_ROWS: usize = 84;
/// The most bytes of right panels that a task packs: a block 256 columns wide.
const MOST: usize = 512 << 10;

/// How the blocked nest is cut. Its loops, from the outermost: strips of `nc` columns, each for one task; blocks of the depth; `mc`
/// rows; panels of `nr` columns; panels of `mr` rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Blocks {
    /// Rows of a tile.
    pub(super) mr: usize,
    /// Columns of a tile.
    pub(super) nr: usize,
    /// Rows that pass by one right panel before the next panel comes.
    pub(super) mc: usize,
    /// The most columns that a task packs.
    pub(super) nc: usize,
}

impl Blocks {
    /// For tiles `mr × nr` of numbers of `bytes`, in blocks at most `kc` deep, the deepest of which has `depth`.
    ///
    /// A tile reads `mr + nr` numbers for each step of the depth, and `nr` is the larger. So a right panel stays in L1 if it fits
    /// there, while the left panels of `mc` rows go by; these come from L2, of which they take a quarter. A strip is read but once
    /// for `mc` rows: it may fill L2, and come from L3 where others use L2 as well.
    ///
    /// If a right panel does not fit L1, a left panel stays there (`mc` is `mr`), and all right panels of a strip go by for each;
    /// they come from L2, of which they take half.
    pub(super) fn new((mr, nr): (usize, usize), bytes: usize, kc: usize, depth: usize, caches: Caches) -> Self {
        let (mc, near) =
            if nr * kc * bytes <= caches.l1 { (caches.l2 / 4 / (kc * bytes) / mr * mr, caches.l2) } else { (mr, caches.l2 / 2) };
        // A shallow product is as wide as L2 allows: its rows are read and written in long runs.
        let nc = near.min(MOST) / bytes / depth.max(1);
        Self { mr, nr, mc: mc.max(mr), nc }
    }

    /// MC of a block so deep: the rows of a shallow one are written in long runs.
    #[inline(always)]
    pub(super) fn mc(&self, depth: usize) -> usize {
        if depth < SHORT { self.mr } else { self.mc }
    }

    /// The most rows that a task has, if the columns make so many strips.
    pub(super) fn rows(strips: usize, threads: usize) -> usize {
        if strips < threads { FEW_ROWS } else { ROWS }
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
    fn few_rows_are_cut_for_the_registers() {
        assert_eq!([1, 2, 10].map(|rows| together(32, rows)), [1, 5, 5]);
        assert_eq!([1, 2, 10].map(|rows| together(8, rows)), [1, 2, 2]);
        assert_eq!([(1, 1), (10, 1), (24, 1), (1, 4)].map(|(rows, threads)| run(32, rows, 4096, threads)), [512, 512, 213, 512]);
        assert_eq!([(1, 1), (10, 1), (24, 1), (1, 4)].map(|(rows, threads)| run(8, rows, 4096, threads)), [4096, 512, 213, 512]);
        assert_eq!([(32, 1), (32, 10), (8, 1), (8, 10)].map(|(registers, rows)| streams(registers, rows)), [16, 16, 8, 16]);
    }

    #[test]
    fn shallow_blocks_are_wide_and_low() {
        for depth in [1, 16, SHORT - 1, SHORT, KC] {
            let blocks = Blocks::new(AVX512, 4, KC, depth, caches(32, 1024, 36 << 10));
            assert_eq!((blocks.mc(depth), blocks.nc), (14, (128 << 10) / depth));
            let blocks = Blocks::new(AVX2, 4, KC, depth, caches(32, 512, 32 << 10));
            assert_eq!((blocks.mc(depth), blocks.nc), (if depth < SHORT { 6 } else { 60 }, (128 << 10) / depth));
        }
        assert_eq!((Blocks::rows(1, 2), Blocks::rows(2, 2)), (FEW_ROWS, ROWS));
    }

    #[test]
    fn what_is_tall_or_crossed_is_packed() {
        assert_eq!(regime(SKINNY_ROWS, false, false), Regime::Skinny);
        assert_eq!(regime(SKINNY_ROWS + 1, false, false), Regime::Blocked);
        assert_eq!(regime(DOT_ROWS, true, false), Regime::Skinny);
        assert_eq!(regime(DOT_ROWS + 1, true, false), Regime::Blocked);
        assert_eq!(regime(1, true, true), Regime::Blocked);
    }
}
