//! Plans: which kernel, and how many blocks. Pure functions of sizes; sizes that kernels cannot count to are refused here.

use super::device::Gpu;
use super::kernel::Kernel;
use crate::element::DType;
use crate::error::{Error, Result};
use crate::tensor::Shape;

/// Threads of a block, in every kernel: `THREADS` in common.cuh.
pub const THREADS: u32 = 256;
/// Rows, and columns, of a tile of the general engine: `TILE` in engine.cuh.
pub const TILE: u32 = 64;
/// Rows, and columns, of a tile of the wide engine: `WIDE_TILE` in wide.cuh.
pub const WIDE_TILE: u32 = 128;
/// Rows of `x` in a block of the skinny engine: `SKINNY_ROWS` in skinny.cuh.
pub const SKINNY_ROWS: u32 = 16;
/// Columns of `h` in a block of the skinny engine, in a launch of its own or with `y`: `RANK_TILE` in lora_forward.cu.
pub const RANK_TILE: u32 = 16;
/// Columns of a block of the band engine: `BAND_COLS` in band.cuh.
pub const BAND_COLS: u32 = THREADS;
/// Rows of a step of the band engine: `BAND_ROWS` in band.cuh.
pub const BAND_ROWS: u32 = 16;
/// Ranks of a pass of the band engine: `BAND_RANKS` in band.cuh.
pub const BAND_RANKS: u32 = 16;
/// Rows of `W` in a block of the merge: `MERGE_ROWS` in lora_merge.cu.
pub const MERGE_ROWS: u32 = 128;
/// Lanes of a warp: `WARP` in common.cuh.
pub const WARP: u32 = 32;
/// Rows of a block of `magnitude`: `MAGNITUDE_ROWS` in magnitude.cu.
pub const MAGNITUDE_ROWS: u32 = 8;
/// Rows of a warp of `lora_row_norm`: `NORM_ROWS` in lora_row_norm.cu.
pub const NORM_ROWS: u32 = 4;
/// The largest size: kernels count in `int`, round up to whole tiles, and read one step ahead.
pub const MAX_SIZE: u32 = (1 << 31) - 2 * WIDE_TILE;

/// Up to this many rows, `y` and `dx` are made by the skinny engine. It reads `W` once for every 16 rows, all but the first time
/// from the L2 cache: for 64 rows of a bf16 layer of 4096², 4·33.5 MB, 25 µs at 5.5 TB/s. The wide engine has 32 tiles of 128×128
/// there, for 132 multiprocessors, and each takes 64 steps of about 1 µs. At 128 rows the two should be equal. Estimated, not
/// measured.
pub const SKINNY_MAX_ROWS: u32 = 64;
/// Blocks of a launch of the band engine: two for each of an H100's 132 multiprocessors. The partial sums of `dB` then take
/// 264·256·16 floats, 4.3 MB at rank 16, for any size. The same on every GPU, so that every GPU gives the same bits.
pub const BAND_BLOCKS: u32 = 264;

/// A kernel and its launch configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The kernel; its element type is the backend's.
    pub kernel: Kernel,
    /// Blocks; 0 if there is nothing to do.
    pub grid: u32,
    /// Threads of a block.
    pub block: u32,
    /// Bytes of dynamic shared memory of a block.
    pub shared: u32,
}

/// A size as a kernel argument. Errors: [`Error::TooLarge`] beyond [`MAX_SIZE`].
pub fn size(n: usize) -> Result<u32> {
    let small = u32::try_from(n).ok().filter(|&n| n <= MAX_SIZE);
    small.ok_or(Error::TooLarge { shape: Shape { rows: n, cols: 1 }, limit: "a kernel can count" })
}

/// The general engine, for any shape: one block for every tile of an output of `rows × cols`.
pub fn tiles(kernel: Kernel, rows: u32, cols: u32) -> Result<Plan> {
    tiles_of(TILE, kernel, rows, cols)
}

/// A product with an output of `rows × cols`, by the wide engine if it has such a kernel and the lines of both operands start at
/// multiples of 16 bytes (`aligned`) and have lengths (`lines`) of whole ones. In f32, which does not use tensor cores, the wide
/// engine is also required to have a tile for every multiprocessor; in f32 both engines give the same bits.
pub fn product(gpu: Gpu, dtype: DType, kernel: Kernel, [rows, cols]: [u32; 2], lines: [u32; 2], aligned: bool) -> Result<Plan> {
    let aligned = aligned && lines.iter().all(|line| line.is_multiple_of(chunk(dtype)));
    let count = u64::from(rows.div_ceil(WIDE_TILE)) * u64::from(cols.div_ceil(WIDE_TILE));
    match kernel.wide() {
        Some(wide_kernel) if aligned && (dtype.size() == 2 || count >= u64::from(gpu.multiprocessors)) => {
            tiles_of(WIDE_TILE, wide_kernel, rows, cols)
        }
        _ => tiles(kernel, rows, cols),
    }
}

fn tiles_of(tile: u32, kernel: Kernel, rows: u32, cols: u32) -> Result<Plan> {
    blocks_of(kernel, [rows, cols], [tile, tile])
}

/// One thread for every element.
pub fn pointwise(kernel: Kernel, shape: Shape) -> Result<Plan> {
    blocks(kernel, (shape.elements()? as u64).div_ceil(u64::from(THREADS)), shape)
}

/// A copy of `len` elements of `bytes` bytes; returns also the bytes that a thread moves: 16 if rows start (`aligned`) and end at
/// multiples of 16.
pub fn copy(len: usize, cols: usize, bytes: usize, aligned: bool) -> Result<(Plan, usize)> {
    let (kernel, word) = if aligned && (cols * bytes).is_multiple_of(16) { (Kernel::CopyWide, 16) } else { (Kernel::Copy, 2) };
    Ok((pointwise(kernel, Shape { rows: len * bytes / word, cols: 1 })?, word))
}

/// One block for every [`MAGNITUDE_ROWS`] rows of [`THREADS`] columns.
pub fn stripes(kernel: Kernel, rows: u32, cols: u32) -> Result<Plan> {
    blocks_of(kernel, [rows, cols], [MAGNITUDE_ROWS, THREADS])
}

/// One block for every `per_block` items.
pub fn blocks_for(kernel: Kernel, items: u32, per_block: u32) -> Plan {
    Plan { kernel, grid: items.div_ceil(per_block), block: THREADS, shared: 0 }
}

/// Elements in 16 bytes.
pub fn chunk(dtype: DType) -> u32 {
    16 / dtype.size() as u32
}

/// The launches of the forward pass of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// `h` in a launch of its own; `None` if `y`'s launch makes `h`, or the rank is 0.
    pub h: Option<Plan>,
    /// `y`
    pub y: Plan,
    /// True if `y`'s kernel is the skinny one, which also takes `A`.
    pub skinny: bool,
}

/// For each operand, true if all its rows start at multiples of 16 bytes, or if the layer does not have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Aligned {
    /// `x`
    pub x: bool,
    /// `W`
    pub w: bool,
    /// `A`
    pub a: bool,
}

/// Plans `y` for `m` rows, `k` inputs and `n` outputs, and `h` of rank `r`; a layer without an update has rank 0.
pub fn forward(gpu: Gpu, dtype: DType, [m, k, n]: [u32; 3], r: u32, dropout: bool, aligned: Aligned) -> Result<Forward> {
    let whole = k.is_multiple_of(chunk(dtype));
    let has_16_bits = dtype.size() == 2;
    let skinny = whole && aligned.x && aligned.w && m <= SKINNY_MAX_ROWS;
    // The skinny kernel of y makes h without dropout, and makes nothing if y has no columns.
    let y_makes_h = skinny && aligned.a && has_16_bits && r <= RANK_TILE && !dropout && n > 0;
    let h = match r > 0 && !y_makes_h {
        false => None,
        true if whole && aligned.x && aligned.a && (has_16_bits || !dropout) => {
            Some(blocks_of(Kernel::LoraForwardHSkinny, [m, r], [SKINNY_ROWS, RANK_TILE])?)
        }
        true => Some(tiles(Kernel::LoraForwardH, m, r)?),
    };
    let y = match skinny {
        true => blocks_of(Kernel::LoraForwardYSkinny, [m, n], [SKINNY_ROWS, strip_cols(dtype)])?,
        false => product(gpu, dtype, Kernel::LoraForwardY, [m, n], [k, k], aligned.x && aligned.w)?,
    };
    Ok(Forward { h, y, skinny })
}

/// Plans `dx` for `m` rows, `k` inputs and `n` outputs. `aligned`: the rows of `dy` and `W` start at multiples of 16 bytes.
pub fn backward_dx(gpu: Gpu, dtype: DType, [m, k, n]: [u32; 3], aligned: bool) -> Result<Plan> {
    let whole = [n, k].iter().all(|line| line.is_multiple_of(chunk(dtype)));
    match whole && aligned && m <= SKINNY_MAX_ROWS {
        true => blocks_of(Kernel::LoraBackwardDxSkinny, [m, k], [SKINNY_ROWS, strip_cols(dtype)]),
        false => product(gpu, dtype, Kernel::LoraBackwardDx, [m, k], [n, k], aligned),
    }
}

/// Columns of `y` or `dx` in a block of the skinny engine: `W_ROWS` in lora_forward.cu, `STRIP_COLS` in skinny_n_major.cuh.
pub(super) fn strip_cols(dtype: DType) -> u32 {
    64 / dtype.size() as u32
}

/// A launch of the band engine on a matrix: its columns are cut into bands, its rows into shares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bands {
    /// The kernel, and one block for each band, share and pass of [`BAND_RANKS`] ranks.
    pub plan: Plan,
    /// Partial sums of a sum over the columns.
    pub bands: u32,
    /// Partial sums of a sum over the rows: at least 1, so that an empty sum is written.
    pub shares: u32,
    /// Rows of a share, a multiple of [`BAND_ROWS`].
    pub rows_per_share: u32,
}

/// Plans products of a matrix of `rows × cols` with matrices of `r` columns.
pub fn bands(kernel: Kernel, [rows, cols]: [u32; 2], r: u32) -> Result<Bands> {
    let (bands, passes, steps) = (cols.div_ceil(BAND_COLS), r.div_ceil(BAND_RANKS), rows.div_ceil(BAND_ROWS).max(1));
    let across = u64::from(bands) * u64::from(passes);
    let wanted = u64::from(BAND_BLOCKS).div_ceil(across.max(1)) as u32;
    let rows_per_share = steps.div_ceil(wanted) * BAND_ROWS;
    let shares = rows.div_ceil(rows_per_share).max(1);
    let plan = blocks(kernel, across * u64::from(shares), (rows as usize, cols as usize).into())?;
    Ok(Bands { plan, bands, shares, rows_per_share })
}

/// Plans merging into `W` of `n × k`, 16 bytes at a time if the rows of `W` and `A` start (`aligned`) and end at multiples of 16
/// bytes.
pub fn merge(dtype: DType, n: u32, k: u32, aligned: bool) -> Result<Plan> {
    match chunk(dtype) {
        width if aligned && k.is_multiple_of(width) => blocks_of(Kernel::LoraMergeWide, [n, k], [MERGE_ROWS, WARP * width]),
        _ => blocks_of(Kernel::LoraMerge, [n, k], [MERGE_ROWS, WARP]),
    }
}

/// One block for every `each[0] × each[1]` elements of an output of `size`.
fn blocks_of(kernel: Kernel, size: [u32; 2], each: [u32; 2]) -> Result<Plan> {
    let [rows, cols] = size;
    let count = u64::from(rows.div_ceil(each[0])) * u64::from(cols.div_ceil(each[1]));
    blocks(kernel, count, (rows as usize, cols as usize).into())
}

fn blocks(kernel: Kernel, blocks: u64, shape: Shape) -> Result<Plan> {
    // The hardware counts blocks in 31 bits.
    let grid = u32::try_from(blocks).ok().filter(|&grid| grid <= i32::MAX as u32);
    let grid = grid.ok_or(Error::TooLarge { shape, limit: "a grid can count" })?;
    Ok(Plan { kernel, grid, block: THREADS, shared: 0 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const H100: Gpu = Gpu { capability: (9, 0), multiprocessors: 132 };
    const ALIGNED: Aligned = Aligned { x: true, w: true, a: true };

    proptest! {
        #[test]
        fn tiles_cover_the_output_and_no_more(rows in 0..100_000u32, cols in 0..100_000u32) {
            let grid = u64::from(tiles(Kernel::LoraMerge, rows, cols).unwrap().grid);
            let (down, across) = (u64::from(rows.div_ceil(TILE)), u64::from(cols.div_ceil(TILE)));
            prop_assert_eq!(grid, down * across);
            prop_assert!(down * 64 >= u64::from(rows) && (down * 64).saturating_sub(63) <= u64::from(rows));
            prop_assert_eq!(grid == 0, rows == 0 || cols == 0);
        }

        #[test]
        fn every_row_is_in_one_share(rows in 0..1_000_000u32, cols in 0..1_000_000u32, r in 1..100u32) {
            let Bands { plan, bands, shares, rows_per_share } = super::bands(Kernel::LoraBackwardDy, [rows, cols], r).unwrap();
            prop_assert_eq!(bands, cols.div_ceil(BAND_COLS));
            prop_assert_eq!(plan.grid, bands * r.div_ceil(BAND_RANKS) * shares);
            prop_assert!(rows_per_share % BAND_ROWS == 0 && rows_per_share > 0);
            let end = u64::from(shares) * u64::from(rows_per_share);
            prop_assert!(end >= u64::from(rows) && end - u64::from(rows_per_share) < u64::from(rows).max(1));
            // Enough blocks to fill the device, and no more partial sums than that takes.
            prop_assert!(shares == 1 || plan.grid <= 2 * BAND_BLOCKS.max(bands * r.div_ceil(BAND_RANKS)));
        }

        #[test]
        fn every_output_has_one_block(m in 0..5000u32, k in 0..5000u32, n in 0..5000u32, r in 0..70u32, dropout: bool) {
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                let Forward { h, y, skinny } = forward(H100, dtype, [m, k, n], r, dropout, ALIGNED).unwrap();
                let [tall, wide] = match y.kernel {
                    Kernel::LoraForwardY => [TILE, TILE],
                    Kernel::LoraForwardYWide => [WIDE_TILE, WIDE_TILE],
                    _ => [SKINNY_ROWS, 64 / dtype.size() as u32],
                };
                prop_assert_eq!(y.grid, m.div_ceil(tall) * n.div_ceil(wide));
                let dx = backward_dx(H100, dtype, [m, k, n], true).unwrap();
                let [tall, wide] = match dx.kernel {
                    Kernel::LoraBackwardDx => [TILE, TILE],
                    Kernel::LoraBackwardDxWide => [WIDE_TILE, WIDE_TILE],
                    _ => [SKINNY_ROWS, 64 / dtype.size() as u32],
                };
                prop_assert_eq!(dx.grid, m.div_ceil(tall) * k.div_ceil(wide));
                // Kernels that load 16 bytes have lines of whole ones, and wide tiles in f32 leave no multiprocessor idle.
                prop_assert!(dx.kernel == Kernel::LoraBackwardDx || k % chunk(dtype) == 0 && n % chunk(dtype) == 0);
                prop_assert!(dtype != DType::F32 || dx.kernel != Kernel::LoraBackwardDxWide || dx.grid >= 132);
                prop_assert_eq!(skinny, y.kernel == Kernel::LoraForwardYSkinny);
                // Kernels that load 16 bytes have lines of whole ones.
                prop_assert!(!skinny || (k % chunk(dtype) == 0 && m <= SKINNY_MAX_ROWS));
                // The kernel that makes h has blocks for all of it.
                match h {
                    Some(h) => {
                        let [tall, wide] = if h.kernel == Kernel::LoraForwardH { [TILE, TILE] } else { [SKINNY_ROWS, RANK_TILE] };
                        prop_assert_eq!(h.grid, m.div_ceil(tall) * r.div_ceil(wide));
                    }
                    None => prop_assert!(r == 0 || skinny && r <= RANK_TILE && !dropout && n > 0),
                }
                let plan = merge(dtype, n, k, true).unwrap();
                let wide = if plan.kernel == Kernel::LoraMerge { WARP } else { WARP * chunk(dtype) };
                prop_assert_eq!(plan.grid, n.div_ceil(MERGE_ROWS) * k.div_ceil(wide));
                prop_assert_eq!(plan.kernel == Kernel::LoraMergeWide, k % chunk(dtype) == 0);
            }
        }

        #[test]
        fn every_element_has_one_thread(rows in 0..100_000usize, cols in 0..100_000usize) {
            let threads = u64::from(pointwise(Kernel::Add, Shape { rows, cols }).unwrap().grid) * u64::from(THREADS);
            let elements = (rows * cols) as u64;
            prop_assert!(elements <= threads && threads < elements + u64::from(THREADS));
        }
    }

    #[test]
    fn big_products_with_aligned_lines_go_to_the_wide_engine() {
        let kernel = |dtype, sizes, lines| product(H100, dtype, Kernel::LoraForwardY, sizes, lines, true).unwrap();
        let plan = |kernel, grid| Plan { kernel, grid, block: 256, shared: 0 };
        for dtype in [DType::F16, DType::BF16] {
            assert_eq!(kernel(dtype, [129, 1], [8, 4096]), plan(Kernel::LoraForwardYWide, 2));
            assert_eq!(kernel(dtype, [129, 1], [8, 12]), plan(Kernel::LoraForwardY, 3));
        }
        // 132 tiles, and 121: f32 takes the wide engine only with a tile for every multiprocessor.
        assert_eq!(kernel(DType::F32, [1408, 1536], [8, 12]), plan(Kernel::LoraForwardYWide, 132));
        assert_eq!(kernel(DType::F32, [1408, 1408], [8, 12]), plan(Kernel::LoraForwardY, 484));
        assert_eq!(kernel(DType::F32, [4096, 4096], [8, 6]), plan(Kernel::LoraForwardY, 4096));
        assert_eq!(product(H100, DType::F16, Kernel::AdamFactored, [1, 1], [8, 8], true).unwrap().kernel, Kernel::AdamFactored);
    }

    #[test]
    fn a_layer_of_few_rows_is_one_launch() {
        let layer = |dtype, m, r, dropout| forward(H100, dtype, [m, 4096, 4096], r, dropout, ALIGNED).unwrap();
        let skinny = |grid| Plan { kernel: Kernel::LoraForwardYSkinny, grid, block: 256, shared: 0 };
        for m in [1, 16] {
            assert_eq!(layer(DType::BF16, m, 16, false), Forward { h: None, y: skinny(128), skinny: true });
        }
        assert_eq!(layer(DType::F16, SKINNY_MAX_ROWS, 1, false), Forward { h: None, y: skinny(512), skinny: true });
        assert_eq!(layer(DType::F16, SKINNY_MAX_ROWS + 1, 1, false).y.kernel, Kernel::LoraForwardYWide);
        // The same for dx, whose blocks have strips of 64 bytes.
        let dx = |dtype, m| backward_dx(H100, dtype, [m, 4096, 4096], true).unwrap();
        assert_eq!(dx(DType::BF16, 1), Plan { kernel: Kernel::LoraBackwardDxSkinny, grid: 128, block: 256, shared: 0 });
        assert_eq!(
            dx(DType::F32, SKINNY_MAX_ROWS),
            Plan { kernel: Kernel::LoraBackwardDxSkinny, grid: 1024, block: 256, shared: 0 }
        );
        assert_eq!(dx(DType::F16, SKINNY_MAX_ROWS + 1).kernel, Kernel::LoraBackwardDxWide);
        // Two launches where y's kernel cannot make h.
        let h = |dtype, r, dropout| layer(dtype, 1, r, dropout).h.map(|plan| (plan.kernel, plan.grid));
        assert_eq!(h(DType::BF16, 17, false), Some((Kernel::LoraForwardHSkinny, 2)));
        assert_eq!(h(DType::BF16, 16, true), Some((Kernel::LoraForwardHSkinny, 1)));
        assert_eq!(h(DType::F32, 16, false), Some((Kernel::LoraForwardHSkinny, 1)));
        assert_eq!(h(DType::F32, 16, true), Some((Kernel::LoraForwardH, 1)));
        assert_eq!(h(DType::F32, 0, false), None);
    }

    /// Kernels that load 16 bytes at once are not used for operands that do not start at multiples of 16 bytes.
    #[test]
    fn misaligned_operands_use_kernels_for_any_shape() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            for m in [1, 16, SKINNY_MAX_ROWS, 4096] {
                let planned = |aligned| forward(H100, dtype, [m, 4096, 4096], 16, false, aligned).unwrap();
                for aligned in [Aligned { x: false, ..ALIGNED }, Aligned { w: false, ..ALIGNED }] {
                    assert_eq!(planned(aligned).y.kernel, Kernel::LoraForwardY, "{m} rows, {aligned:?}");
                }
                // A is read by h's kernel only.
                let aligned_plan = planned(ALIGNED);
                let Forward { h, y, .. } = planned(Aligned { a: false, ..ALIGNED });
                assert_eq!((h.map(|h| h.kernel), y.kernel), (Some(Kernel::LoraForwardH), aligned_plan.y.kernel));
                let x = planned(Aligned { x: false, ..ALIGNED }).h;
                assert_eq!(x.map(|h| h.kernel), Some(Kernel::LoraForwardH));
                assert_eq!(backward_dx(H100, dtype, [m, 4096, 4096], false).unwrap().kernel, Kernel::LoraBackwardDx);
            }
            assert_eq!(merge(dtype, 4096, 4096, false).unwrap().kernel, Kernel::LoraMerge);
            assert_eq!(
                product(H100, dtype, Kernel::LinearBackwardDw, [4096; 2], [4096; 2], false).unwrap().kernel,
                Kernel::LinearBackwardDw
            );
        }
        let kernel = |cols, bytes, aligned| copy(8 * cols, cols, bytes, aligned).unwrap().0.kernel;
        assert_eq!(
            [kernel(8, 2, true), kernel(7, 2, true), kernel(8, 2, false), kernel(4, 4, true)],
            [Kernel::CopyWide, Kernel::Copy, Kernel::Copy, Kernel::CopyWide]
        );
    }

    #[test]
    fn sizes_that_kernels_cannot_count_to_are_refused() {
        assert_eq!(size(MAX_SIZE as usize).unwrap(), MAX_SIZE);
        for n in [MAX_SIZE as usize + 1, u32::MAX as usize, u32::MAX as usize + 2, usize::MAX] {
            assert!(matches!(size(n), Err(Error::TooLarge { .. })), "{n}");
        }
        assert!(matches!(tiles(Kernel::Add, MAX_SIZE, MAX_SIZE), Err(Error::TooLarge { .. })));
        assert!(matches!(pointwise(Kernel::Add, Shape { rows: 1 << 45, cols: 1 }), Err(Error::TooLarge { .. })));
        assert!(matches!(bands(Kernel::LoraBackwardDa, [1, MAX_SIZE], MAX_SIZE), Err(Error::TooLarge { .. })));
        // Rounding up to whole tiles, and one more step along the depth, stay inside an int.
        assert!(
            MAX_SIZE.next_multiple_of(WIDE_TILE) + WIDE_TILE <= i32::MAX as u32
                && MAX_SIZE.next_multiple_of(BAND_COLS) <= i32::MAX as u32
        );
    }
}
