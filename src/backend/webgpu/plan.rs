//! Plans: tiles and pieces. Pure functions of sizes and limits, tested without an adapter.

use std::ops::Range;

/// Limits of launches: those of the adapter, or smaller ones, so that tests can plan for a smaller adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Invocations of a workgroup.
    pub invocations: u32,
    /// Bytes of workgroup memory.
    pub workgroup_bytes: u32,
    /// Workgroups in one dimension of a grid.
    pub groups: u32,
    /// Bytes of a binding.
    pub binding_bytes: u64,
    /// Invocations of a subgroup; 0 if subgroups cannot be used or vary in size.
    pub subgroup: u32,
    /// Rows, and columns, of cooperative matrices of f16 that accumulate in f32; 0 if they cannot be used.
    pub matrix: u32,
}

impl Limits {
    /// The smaller value of each limit.
    pub(super) fn min(self, other: Self) -> Self {
        Self {
            invocations: self.invocations.min(other.invocations),
            workgroup_bytes: self.workgroup_bytes.min(other.workgroup_bytes),
            groups: self.groups.min(other.groups),
            binding_bytes: self.binding_bytes.min(other.binding_bytes),
            subgroup: self.subgroup.min(other.subgroup),
            matrix: self.matrix.min(other.matrix),
        }
    }

    /// Invocations of a workgroup: a power of two, at most 256.
    pub(super) fn threads(self) -> u32 {
        1 << self.invocations.clamp(1, 256).ilog2()
    }
}

/// The regime and tile of a sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Algorithm {
    Tiles(Tile),
    Matrices(Matrices),
    Skinny(Skinny),
}

impl Algorithm {
    /// Rows and columns of the output in a workgroup.
    pub(super) fn block(self) -> [u32; 2] {
        match self {
            Algorithm::Tiles(tile) => [tile.rows, tile.cols],
            Algorithm::Matrices(_) => [Matrices::TILE.rows, Matrices::TILE.cols],
            Algorithm::Skinny(skinny) => [skinny.rows, 4 * skinny.lanes],
        }
    }

    /// Numbers of workgroups along the columns and along the rows.
    pub(super) fn grid(self, rows: usize, cols: usize) -> [u32; 2] {
        let [high, across] = self.block();
        [cols.div_ceil(across as usize) as u32, rows.div_ceil(high as usize) as u32]
    }
}

/// The tile for a base product of f16 by f16, in cooperative matrices; see `shaders/matrices.wgsl`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Matrices {
    /// Rows, and columns, of a matrix.
    pub(super) size: u32,
    /// Matrices of a subgroup.
    pub(super) each: u32,
}

impl Limits {
    /// True if a large product can use cooperative matrices.
    pub(super) fn supports_matrices(self) -> bool {
        Matrices::new(Matrices::TILE.rows as usize, Matrices::TILE.cols as usize, self).is_some()
    }
}

impl Matrices {
    /// The tile of a workgroup, with an invocation for every 4×4 sums.
    pub(super) const TILE: Tile = Tile { rows: 64, cols: 64, depth: 16, slices: 1, four_blocks: false };
    /// Additional workgroup memory: f16 lines of 72 for both sides, and all the sums.
    pub(super) const WORKGROUP_BYTES: u32 =
        2 * 2 * Self::TILE.depth * (Self::TILE.rows + 8) + 4 * Self::TILE.rows * Self::TILE.cols;

    /// `None` if the adapter has no cooperative matrices, or the output is smaller than a tile.
    pub(super) fn new(rows: usize, cols: usize, limits: Limits) -> Option<Self> {
        let Limits { subgroup, matrix: size, .. } = limits;
        let tile = Self::TILE;
        let fits = limits.threads() >= tile.threads()
            && limits.workgroup_bytes >= tile.workgroup_bytes() + Self::WORKGROUP_BYTES
            && rows >= tile.rows as usize
            && cols >= tile.cols as usize;
        if !fits || size == 0 || subgroup == 0 || tile.threads() % subgroup != 0 {
            return None;
        }
        let (all, across) = ((tile.rows / size) * (tile.cols / size), tile.cols / size);
        let each = all / (tile.threads() / subgroup);
        // Every subgroup has a whole number of matrices, all in one row.
        (each * (tile.threads() / subgroup) == all && across.is_multiple_of(each)).then_some(Self { size, each })
    }
}

/// The work of a workgroup in the skinny regime; see `shaders/skinny.wgsl`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Skinny {
    /// Rows: 1, 4 or 8. More than eight rows take several workgroups; few values mean few shaders to compile.
    pub(super) rows: u32,
    /// Columns, in fours.
    pub(super) lanes: u32,
    /// Invocations that share four columns, and divide the depth.
    pub(super) slices: u32,
    /// Consecutive invocations divide the depth, not the columns.
    pub(super) by_depth: bool,
    /// The invocations that share columns are a subgroup.
    pub(super) subgroups: bool,
}

impl Skinny {
    /// Up to this many rows are skinny; for more, a tile in workgroup memory reads less.
    pub(super) const MAX_ROWS: usize = 16;

    /// If consecutive invocations share columns, a subgroup reads along the depth. Otherwise eight of them read 32 columns, 128
    /// consecutive bytes, and the others divide the depth, so that a few thousand columns fill a device.
    pub(super) fn new(rows: usize, cols: usize, by_depth: bool, limits: Limits) -> Self {
        let rows = [1, 4].into_iter().find(|&few| rows <= few).unwrap_or(8) as u32;
        let fours = cols.div_ceil(4).next_power_of_two().min(256) as u32;
        // The reduction needs 64 bytes, a block of sums, for half of the invocations.
        let threads = limits.threads().min(1 << (limits.workgroup_bytes / 32).max(1).ilog2());
        let subgroups = by_depth && limits.subgroup > 1 && limits.subgroup <= threads;
        if subgroups {
            let lanes = (threads / limits.subgroup).min(fours);
            return Self { rows, lanes, slices: limits.subgroup, by_depth, subgroups };
        }
        let lanes = 8.min(fours).min(threads);
        Self { rows, lanes, slices: threads / lanes, by_depth, subgroups }
    }

    /// Invocations of the workgroup.
    pub(super) fn threads(self) -> u32 {
        self.lanes * self.slices
    }

    /// Blocks of 16 sums in workgroup memory, for the reduction over the slices.
    pub(super) fn reduction_blocks(self) -> u32 {
        (self.threads() / 2).max(1)
    }
}

/// The tile of a workgroup of the engine; see `shaders/engine.wgsl`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Tile {
    pub(super) rows: u32,
    pub(super) cols: u32,
    pub(super) depth: u32,
    /// Invocations that share a block of sums, and divide the depth.
    pub(super) slices: u32,
    /// An invocation owns four blocks of 4×4 sums instead of one.
    pub(super) four_blocks: bool,
}

impl Tile {
    /// The tile for `rows × cols` sums over a depth. It is no deeper than the sums.
    ///
    /// Few rows (or columns) get a low tile, whose invocations divide the depth: reading the other side once is then the work.
    /// Many rows and columns get a tile with four blocks an invocation, which reads workgroup memory half as often.
    pub(super) fn new(rows: usize, cols: usize, depth: usize, limits: Limits) -> Self {
        let threads = limits.threads();
        let depth = depth.next_power_of_two().clamp(4, 64) as u32;
        let four_blocks = Self { rows: 128, cols: 128, depth: depth.min(16), slices: 1, four_blocks: true };
        if rows >= 512
            && cols >= 512
            && four_blocks.threads() <= threads
            && four_blocks.workgroup_bytes() <= limits.workgroup_bytes
        {
            return four_blocks;
        }
        let (mut high, mut across) = (side(rows), side(cols));
        while (high / 4) * (across / 4) > threads {
            *(if high > across { &mut high } else { &mut across }) /= 2;
        }
        let slices = (threads / ((high / 4) * (across / 4))).min(depth);
        let mut tile = Self { rows: high, cols: across, depth: depth.min(depth_for(slices)), slices, four_blocks: false };
        let too_big = |tile: &Self| tile.workgroup_bytes() > limits.workgroup_bytes;
        while too_big(&tile) && tile.depth > 16 {
            tile.depth /= 2;
        }
        while too_big(&tile) && tile.slices > 1 {
            tile.slices /= 2;
        }
        while too_big(&tile) && tile.depth > 4 {
            tile.depth /= 2;
        }
        tile
    }

    /// Invocations of the workgroup.
    pub(super) fn threads(self) -> u32 {
        let blocks = if self.four_blocks { 4 } else { 1 };
        (self.rows / 4) * (self.cols / 4) * self.slices / blocks
    }

    /// Blocks of 16 sums that wait to be added to another slice's.
    pub(super) fn reduction_blocks(self) -> u32 {
        if self.slices > 1 { self.threads() / 2 } else { 1 }
    }

    /// Both sides of the tile, each line of depth padded by 16 bytes, and the blocks of the reduction.
    pub(super) fn workgroup_bytes(self) -> u32 {
        4 * self.depth * (self.rows + 4 + self.cols + 4) + 64 * self.reduction_blocks()
    }
}

/// Depth of a tile: every slice gets a few depths of it, so that barriers are rare.
fn depth_for(slices: u32) -> u32 {
    if slices == 1 { 16 } else { (4 * slices).clamp(32, 64) }
}

fn side(len: usize) -> u32 {
    match len {
        0..=4 => 4,
        5..=16 => 16,
        _ => 64,
    }
}

/// The four dimensions of a sum of two products.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Axis {
    Rows,
    Cols,
    Depth,
    BaseDepth,
}

/// A part of a sum: ranges of rows and columns of the output, and of the depths of the two products.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece(pub(super) [Range<usize>; 4]);

impl Piece {
    /// The whole sum.
    pub(super) fn whole(rows: usize, cols: usize, depth: usize, base_depth: usize) -> Self {
        Self([0..rows, 0..cols, 0..depth, 0..base_depth])
    }

    pub(super) fn range(&self, axis: Axis) -> Range<usize> {
        self.0[axis as usize].clone()
    }

    pub(super) fn len(&self, axis: Axis) -> usize {
        self.0[axis as usize].len()
    }

    /// True if no earlier piece contributes to the same sums.
    pub(super) fn begins(&self) -> bool {
        self.range(Axis::Depth).start == 0 && self.range(Axis::BaseDepth).start == 0
    }

    /// Cuts the piece in two. If a depth is cut, the other product stays in the first half.
    fn halves(self, axis: Axis) -> [Self; 2] {
        let Range { start, end } = self.range(axis);
        let half = (end - start) / 2;
        // Cut at a multiple of four, so that vec4 loads stay possible.
        let middle = start + if half < 4 { half } else { half / 4 * 4 };
        let (mut first, mut second) = (self.clone(), self);
        first.0[axis as usize].end = middle;
        second.0[axis as usize].start = middle;
        let other = match axis {
            Axis::Depth => Axis::BaseDepth,
            Axis::BaseDepth => Axis::Depth,
            Axis::Rows | Axis::Cols => return [first, second],
        };
        second.0[other as usize].start = second.0[other as usize].end;
        [first, second]
    }
}

/// A matrix that a piece reads or writes: its two axes, strides and element size.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operand {
    pub(super) axes: [Axis; 2],
    /// Elements between consecutive indices of each axis.
    pub(super) strides: [usize; 2],
    /// Bytes of an element.
    pub(super) size: usize,
}

impl Operand {
    /// Bytes from the first to the last element of the matrix in a piece.
    pub(super) fn span(&self, piece: &Piece) -> u64 {
        let [i, j] = self.axes.map(|axis| piece.len(axis));
        if i == 0 || j == 0 {
            return 0;
        }
        (((i - 1) * self.strides[0] + (j - 1) * self.strides[1] + 1) * self.size) as u64
    }

    /// The axis whose halving shrinks the span most.
    fn cut(&self, piece: &Piece) -> Option<Axis> {
        let reach = |side: usize| piece.len(self.axes[side]).saturating_sub(1) * self.strides[side];
        let side = if reach(0) >= reach(1) { 0 } else { 1 };
        (reach(side) > 0).then_some(self.axes[side])
    }
}

/// Cuts a sum into pieces whose operands each fit a binding of `bytes` bytes and whose grids fit a launch.
///
/// Pieces with the same sums are in the order of their depth; [`begins`](Piece::begins) is true for the first.
pub(super) fn pieces(whole: Piece, operands: &[Operand], most: [usize; 2], bytes: u64) -> Vec<Piece> {
    let too_long = operands.iter().filter(|operand| operand.span(&whole) > bytes).find_map(|operand| operand.cut(&whole));
    let too_many = [Axis::Rows, Axis::Cols].into_iter().find(|&axis| whole.len(axis) > most[axis as usize]);
    match too_many.or(too_long) {
        Some(axis) => whole.halves(axis).into_iter().flat_map(|half| pieces(half, operands, most, bytes)).collect(),
        None => vec![whole],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const WEBGPU: Limits =
        Limits { invocations: 256, workgroup_bytes: 16384, groups: 65535, binding_bytes: 128 << 20, subgroup: 0, matrix: 0 };

    /// The engine requires powers of two, whole blocks, and no more than the limits.
    fn assert_tile_is_sound(tile: Tile, limits: Limits) {
        for side in [tile.rows, tile.cols, tile.depth, tile.slices] {
            assert!(side.is_power_of_two(), "{tile:?}");
        }
        assert!(tile.depth >= 4, "{tile:?}");
        let block = if tile.four_blocks { 8 } else { 4 };
        assert!(tile.rows >= block && tile.cols >= block, "{tile:?}");
        assert!(tile.slices == 1 || !tile.four_blocks, "{tile:?}");
        assert!(tile.threads() <= limits.invocations, "{tile:?}");
        assert!(tile.workgroup_bytes() <= limits.workgroup_bytes, "{tile:?}");
    }

    #[test]
    fn few_rows_share_the_depth_and_many_fill_the_tile() {
        let tile = |rows, cols| {
            let Tile { rows, cols, depth, slices, .. } = Tile::new(rows, cols, 1000, WEBGPU);
            [rows, cols, depth, slices]
        };
        let matrices = |subgroup, matrix| {
            let limits = Limits { workgroup_bytes: 32768, subgroup, matrix, ..WEBGPU };
            Matrices::new(64, 64, limits).map(|matrices| matrices.each)
        };
        // lavapipe, NVIDIA, Apple, a GPU with subgroups of 64; and one with more subgroups than matrices.
        assert_eq!([(8, 8), (32, 16), (32, 8), (64, 16)].map(|(s, m)| matrices(s, m)), [Some(2), Some(2), Some(8), Some(4)]);
        assert_eq!(matrices(8, 16), None);
        assert_eq!(tile(1, 4096), [4, 64, 16, 16]);
        assert_eq!(tile(10, 2000), [16, 64, 16, 4]);
        assert_eq!(tile(512, 16), [64, 16, 16, 4]);
        assert_eq!(tile(100, 100), [64, 64, 16, 1]);
        let roomy = Limits { workgroup_bytes: 32768, ..WEBGPU };
        assert_eq!(Tile::new(100, 100, 5, WEBGPU).depth, 8);
        assert!(Tile::new(1024, 1024, 1024, roomy).four_blocks && !Tile::new(1024, 1024, 1024, WEBGPU).four_blocks);
    }

    proptest! {
        #[test]
        fn tiles_stay_within_limits(
            rows in 1usize..5000, cols in 1usize..5000, depth in 0usize..200,
            invocations in 1u32..2000, workgroup_bytes in 4096u32..70_000,
        ) {
            let limits = Limits { invocations, workgroup_bytes, ..WEBGPU };
            assert_tile_is_sound(Tile::new(rows, cols, depth, limits), limits);
        }

        #[test]
        fn cooperative_matrices_cover_the_tile_once(size in prop::sample::select(vec![8u32, 16]), subgroup in 0u32..8) {
            let limits = Limits { workgroup_bytes: 32768, subgroup: 1 << subgroup, matrix: size, ..WEBGPU };
            if let Some(Matrices { size, each }) = Matrices::new(64, 1000, limits) {
                let subgroups = Matrices::TILE.threads() >> subgroup;
                let mut owned: Vec<[u32; 2]> = Vec::new();
                for first in (0..subgroups).map(|subgroup| subgroup * each) {
                    let [row, col] = [first / (64 / size), first % (64 / size)];
                    prop_assert!(col + each <= 64 / size);
                    owned.extend((0..each).map(|q| [row, col + q]));
                }
                let all = (0..64 / size).flat_map(|row| (0..64 / size).map(move |col| [row, col]));
                prop_assert_eq!(owned, all.collect::<Vec<_>>());
            }
        }

        #[test]
        fn few_rows_stay_within_limits(
            rows in 1usize..=16, cols in 1usize..5000, by_depth in any::<bool>(), subgroup in 0u32..8,
            invocations in 1u32..2000, workgroup_bytes in 4096u32..70_000,
        ) {
            let subgroup = (1 << subgroup) * u32::from(subgroup > 0);
            let limits = Limits { invocations, workgroup_bytes, subgroup, ..WEBGPU };
            let skinny = Skinny::new(rows, cols, by_depth, limits);
            prop_assert!(skinny.threads() <= limits.invocations && skinny.lanes > 0 && skinny.slices > 0);
            prop_assert!(skinny.subgroups || 64 * skinny.reduction_blocks() <= workgroup_bytes);
            prop_assert!(!skinny.subgroups || skinny.slices == subgroup);
            let [across, down] = Algorithm::Skinny(skinny).grid(rows, cols);
            prop_assert!((down * skinny.rows) as usize >= rows);
            let covered = across * 4 * skinny.lanes;
            prop_assert!(covered as usize >= cols && ((covered - 4 * skinny.lanes) as usize) < cols);
        }

        /// Every product of every sum is in exactly one piece, pieces are in order, and every piece fits.
        #[test]
        fn pieces_cover_a_sum_once(
            m in 0usize..9, n in 0usize..9, depth in 0usize..9, more in 0usize..5,
            bytes in 4u64..200, most in 1usize..12, transposed in any::<[bool; 3]>(),
        ) {
            let operand = |axes, sizes: [usize; 2], transposed| {
                let strides = if transposed { [1, sizes[0]] } else { [sizes[1], 1] };
                Operand { axes, strides, size: 4 }
            };
            let operands = [
                operand([Axis::Rows, Axis::Depth], [m, depth], transposed[0]),
                operand([Axis::Depth, Axis::Cols], [depth, n], transposed[1]),
                operand([Axis::Rows, Axis::BaseDepth], [m, more], false),
                operand([Axis::BaseDepth, Axis::Cols], [more, n], transposed[2]),
                operand([Axis::Rows, Axis::Cols], [m, n], false),
            ];
            let pieces = pieces(Piece::whole(m, n, depth, more), &operands, [most, most], bytes);
            let mut base = vec![0; m * n * depth];
            let mut update = vec![0; m * n * more];
            let mut begun = vec![0; m * n];
            for piece in &pieces {
                prop_assert!(operands.iter().all(|operand| operand.span(piece) <= bytes));
                prop_assert!(piece.len(Axis::Rows) <= most && piece.len(Axis::Cols) <= most);
                for (i, j) in piece.range(Axis::Rows).flat_map(|i| piece.range(Axis::Cols).map(move |j| (i, j))) {
                    begun[i * n + j] += usize::from(piece.begins());
                    prop_assert_eq!(begun[i * n + j], 1, "added to before it began");
                    piece.range(Axis::Depth).for_each(|p| base[(i * n + j) * depth + p] += 1);
                    piece.range(Axis::BaseDepth).for_each(|p| update[(i * n + j) * more + p] += 1);
                }
            }
            prop_assert!(base.iter().chain(&update).chain(&begun).all(|&times| times == 1));
        }
    }
}
