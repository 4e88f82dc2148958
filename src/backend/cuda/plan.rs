//! Sizes → which kernel, and how many blocks. Pure arithmetic; a size that kernels cannot count to stops here.

use crate::element::DType;
use crate::error::{Error, Result};
use crate::tensor::Shape;

/// Threads of a block, in every kernel: `THREADS` in common.cuh.
pub const THREADS: u32 = 256;
/// Rows, and columns, of the output that a block of the engine makes: `TILE` in engine.cuh.
pub const TILE: u32 = 64;
/// The same of the engine for tensor cores: `WIDE` in tensor.cuh.
pub const WIDE: u32 = 128;
/// 16-bit elements in 16 bytes: `CHUNK` in tensor.cuh.
pub const CHUNK: u32 = 8;
/// Lanes of a warp: `WARP` in common.cuh.
pub const WARP: u32 = 32;
/// Rows that a block of `magnitude` makes: `STRIPE` in magnitude.cu.
pub const STRIPE: u32 = 8;
/// Rows that a warp of `lora_row_norm` measures: `NORMS` in lora_row_norm.cu.
pub const NORMS: u32 = 4;
/// The largest size: kernels count in `int`, round up to whole tiles, and fetch ahead.
pub const MAX_SIZE: u32 = (1 << 31) - 2 * WIDE;

/// A kernel, and how its work is spread over the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Which of [`kernels`]; the symbol is this and the element type, such as `lora_merge_bf16`.
    pub kernel: &'static str,
    /// Blocks; 0 if there is nothing to do.
    pub grid: u32,
    /// Threads a block.
    pub block: u32,
    /// Bytes of shared memory a block, beyond what the kernel declares.
    pub shared: u32,
}

/// The kernels that every element type has.
const KERNELS: [&str; 23] = [
    "accumulate",
    "adam_dense",
    "adam_factored",
    "add",
    "cross_entropy_mean",
    "cross_entropy_rows",
    "dropout_forward",
    "linear_backward_dbias",
    "linear_backward_dw",
    "linear_backward_dx",
    "linear_forward",
    "lora_backward_da",
    "lora_backward_db",
    "lora_backward_dh",
    "lora_backward_dx",
    "lora_forward_h",
    "lora_forward_y",
    "lora_merge",
    "lora_row_norm",
    "magnitude",
    "magnitude_backward",
    "relu",
    "relu_backward",
];

/// Those that 16-bit elements have besides: the big products on tensor cores, with the same parameters.
const TENSOR_KERNELS: [&str; 5] = [
    "linear_backward_dw_tensor",
    "linear_backward_dx_tensor",
    "linear_forward_tensor",
    "lora_backward_dx_tensor",
    "lora_forward_y_tensor",
];

/// What else only 16-bit elements have: `f32` is not rounded.
const ROUNDING_KERNELS: [&str; 1] = ["lora_merge_by_chance"];

/// Every kernel for an element type. A device looks each of them up once, when it is opened.
pub fn kernels(dtype: DType) -> impl Iterator<Item = &'static str> {
    let has_16_bits = dtype.size() == 2;
    let more = TENSOR_KERNELS.into_iter().chain(ROUNDING_KERNELS).filter(move |_| has_16_bits);
    KERNELS.into_iter().chain(more)
}

/// A size as kernels take it. Errors: [`Error::TooLarge`] beyond [`MAX_SIZE`].
pub fn size(n: usize) -> Result<u32> {
    let small = u32::try_from(n).ok().filter(|&n| n <= MAX_SIZE);
    small.ok_or(Error::TooLarge { shape: Shape { rows: n, cols: 1 }, limit: "a kernel can count" })
}

/// A block for every tile of an output of `rows × cols`, by the engine for any shape.
pub fn tiles(kernel: &'static str, rows: u32, cols: u32) -> Result<Plan> {
    tiles_of(TILE, kernel, rows, cols)
}

/// The same for a big product. It goes to the tensor cores if the elements have 16 bits and the lines of both operands, which
/// are as long as `lines` says, start at multiples of 16 bytes.
pub fn product(dtype: DType, kernel: &'static str, [rows, cols]: [u32; 2], lines: [u32; 2]) -> Result<Plan> {
    let twin = TENSOR_KERNELS.into_iter().find(|name| name.strip_suffix("_tensor") == Some(kernel));
    match twin {
        Some(twin) if dtype.size() == 2 && lines.iter().all(|line| line % CHUNK == 0) => tiles_of(WIDE, twin, rows, cols),
        _ => tiles(kernel, rows, cols),
    }
}

fn tiles_of(tile: u32, kernel: &'static str, rows: u32, cols: u32) -> Result<Plan> {
    blocks(kernel, u64::from(rows.div_ceil(tile)) * u64::from(cols.div_ceil(tile)), (rows as usize, cols as usize).into())
}

/// A thread for every element.
pub fn pointwise(kernel: &'static str, shape: Shape) -> Result<Plan> {
    blocks(kernel, (shape.elements()? as u64).div_ceil(u64::from(THREADS)), shape)
}

/// A block for every [`STRIPE`] rows of [`THREADS`] columns.
pub fn stripes(kernel: &'static str, rows: u32, cols: u32) -> Result<Plan> {
    let grid = u64::from(rows.div_ceil(STRIPE)) * u64::from(cols.div_ceil(THREADS));
    blocks(kernel, grid, (rows as usize, cols as usize).into())
}

/// A warp for every row, or for every 32 columns a block: whatever `each` of a block's share is.
pub fn shares(kernel: &'static str, n: u32, each: u32) -> Plan {
    Plan { kernel, grid: n.div_ceil(each), block: THREADS, shared: 0 }
}

fn blocks(kernel: &'static str, blocks: u64, shape: Shape) -> Result<Plan> {
    // The hardware counts blocks in 31 bits.
    let grid = u32::try_from(blocks).ok().filter(|&grid| grid <= i32::MAX as u32);
    let grid = grid.ok_or(Error::TooLarge { shape, limit: "a grid can count" })?;
    Ok(Plan { kernel, grid, block: THREADS, shared: 0 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn tiles_cover_the_output_and_no_more(rows in 0..100_000u32, cols in 0..100_000u32) {
            let grid = u64::from(tiles("lora_merge", rows, cols).unwrap().grid);
            let (down, across) = (u64::from(rows.div_ceil(TILE)), u64::from(cols.div_ceil(TILE)));
            prop_assert_eq!(grid, down * across);
            prop_assert!(down * 64 >= u64::from(rows) && (down * 64).saturating_sub(63) <= u64::from(rows));
            prop_assert_eq!(grid == 0, rows == 0 || cols == 0);
        }

        #[test]
        fn every_element_has_one_thread(rows in 0..100_000usize, cols in 0..100_000usize) {
            let threads = u64::from(pointwise("add", Shape { rows, cols }).unwrap().grid) * u64::from(THREADS);
            let elements = (rows * cols) as u64;
            prop_assert!(elements <= threads && threads < elements + u64::from(THREADS));
        }
    }

    #[test]
    fn tensor_cores_get_16_bit_products_with_aligned_lines() {
        let kernel = |dtype, lines| product(dtype, "linear_forward", [129, 1], lines).unwrap();
        for dtype in [DType::F16, DType::BF16] {
            assert_eq!(kernel(dtype, [8, 4096]), Plan { kernel: "linear_forward_tensor", grid: 2, block: 256, shared: 0 });
            assert_eq!(kernel(dtype, [8, 12]), Plan { kernel: "linear_forward", grid: 3, block: 256, shared: 0 });
        }
        assert_eq!(kernel(DType::F32, [8, 8]).kernel, "linear_forward");
        assert_eq!(product(DType::F16, "lora_merge", [1, 1], [8, 8]).unwrap().kernel, "lora_merge");
        for twin in TENSOR_KERNELS {
            assert!(KERNELS.contains(&twin.strip_suffix("_tensor").unwrap()), "{twin}");
        }
    }

    #[test]
    fn sizes_that_kernels_cannot_count_to_are_refused() {
        assert_eq!(size(MAX_SIZE as usize).unwrap(), MAX_SIZE);
        for n in [MAX_SIZE as usize + 1, u32::MAX as usize, u32::MAX as usize + 2, usize::MAX] {
            assert!(matches!(size(n), Err(Error::TooLarge { .. })), "{n}");
        }
        assert!(matches!(tiles("add", MAX_SIZE, MAX_SIZE), Err(Error::TooLarge { .. })));
        assert!(matches!(pointwise("add", Shape { rows: 1 << 45, cols: 1 }), Err(Error::TooLarge { .. })));
        // Rounding up to whole tiles, and one more step along the depth, stay inside an int.
        assert!(MAX_SIZE.next_multiple_of(WIDE) + WIDE <= i32::MAX as u32);
    }
}
