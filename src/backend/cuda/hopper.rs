//! Plans for Hopper: which kernel, how many blocks, and the boxes that TMA moves. Pure functions of sizes.

use super::device::{Arg, Gpu};
use super::kernel::Kernel;
use super::operand::{Matrix, MatrixMut};
use super::plan::Plan;

/// Threads of a block: `BLOCK_THREADS` in hopper.cuh.
pub(super) const THREADS: u32 = 384;
/// Rows of a tile: `TILE_M` in hopper.cuh.
pub(super) const TILE_M: u32 = 128;
/// Rows, and columns, of a box of the output, and the depth of a stage: `LINE` and `TILE_K` in hopper.cuh.
pub(super) const LINE: u32 = 64;

/// 16-bit elements in 16 bytes.
pub(super) const CHUNK: u32 = 8;
/// Ranks in a chunk of the update: `UPDATE_K` in hopper.cuh.
pub(super) const UPDATE_K: u32 = 16;

/// A kernel, its grid, and the boxes of its operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Product {
    /// The kernel and its grid: one block per multiprocessor, or fewer if there are fewer tiles in whole clusters.
    pub plan: Plan,
    /// Columns of a tile.
    cols: u32,
    /// Blocks of a cluster, whose tiles are vertical neighbours, and which share the loads of their right panel.
    cluster: u32,
    /// The right side is N-major (`dy·W`), not K-major (`x·Wᵀ`).
    n_major: bool,
}

/// Replaces `kernel` on Hopper, for an output of `rows × cols` and the given depth. `None` on other GPUs, for kernels that do not
/// use tensor cores, and if rows are not multiples of 16 bytes.
pub fn product(gpu: Gpu, kernel: Kernel, [rows, cols]: [u32; 2], depth: u32) -> Option<Product> {
    let whole = |size: u32| size > 0 && size.is_multiple_of(CHUNK);
    let kernels = kernel.hopper()?;
    if gpu.capability != (9, 0) || rows == 0 || !whole(cols) || !whole(depth) {
        return None;
    }
    let clusters = |width: u32| u64::from(rows.div_ceil(TILE_M * cluster(width))) * u64::from(cols.div_ceil(width));
    let room = |width: u32| u64::from(gpu.multiprocessors / cluster(width)).max(1);
    // Estimated time: rounds of tiles; a tile of 128 columns has half the work, at nine tenths of the speed.
    let rounds = |width: u32| clusters(width).div_ceil(room(width));
    let wide_tiles = gpu.multiprocessors >= cluster(256) && rounds(256) * 18 <= rounds(128) * 10;
    let n_major = kernel == Kernel::LoraBackwardDxWide;
    let (kernel, width) = if wide_tiles { (kernels[0], 256) } else { (kernels[1], 128) };
    u32::try_from(clusters(width)).ok().filter(|&clusters| clusters <= i32::MAX as u32)?;
    let grid = clusters(width).min(room(width)) as u32 * cluster(width);
    let plan = Plan { kernel, grid, block: THREADS, shared: shared(width) };
    Some(Product { plan, cols: width, cluster: cluster(width), n_major })
}

/// Replaces a planned `lhs·Wᵀ` or `lhs·W` on Hopper, if the rows of all operands start at multiples of 16 bytes and `out` is
/// overwritten: these kernels do not read `out`.
pub(super) fn replacement<M>(
    gpu: Gpu,
    plan: Plan,
    lhs: &Matrix<'_, M>,
    w: Option<&Matrix<'_, M>>,
    out: &MatrixMut<'_, M>,
    accumulate: bool,
) -> Option<Product> {
    let takes = !accumulate && lhs.aligned && out.aligned && w.is_some_and(|w| w.aligned);
    takes.then(|| product(gpu, plan.kernel, [out.rows, out.cols], lhs.cols)).flatten()
}

/// Blocks of a cluster: `CLUSTER` in hopper.cuh.
fn cluster(cols: u32) -> u32 {
    if cols == 256 { 2 } else { 1 }
}

/// Bytes of shared memory, `SharedMemory` in hopper.cuh: stages, staged output, a chunk of the update, and barriers.
fn shared(cols: u32) -> u32 {
    let stages = if cols == 256 { 3 } else { 5 };
    let (stage, out, chunk) = (2 * LINE * (TILE_M + cols), 2 * TILE_M * cols, 4 * UPDATE_K * cols);
    let barriers = 8 * (2 * stages + 2);
    (stages * stage + out + chunk + barriers).next_multiple_of(1024)
}

impl Product {
    /// The left side, `rows × depth`.
    pub(super) fn lhs<'a, M>(&self, lhs: Matrix<'a, M>) -> Arg<'a, M> {
        lhs.boxes([TILE_M, LINE])
    }

    /// The right side, as stored; a block loads its share of the cluster's panel.
    pub(super) fn rhs<'a, M>(&self, rhs: Matrix<'a, M>) -> Arg<'a, M> {
        rhs.boxes([if self.n_major { LINE } else { self.cols / self.cluster }, LINE])
    }

    /// The output.
    pub(super) fn out<'a, M>(&self, out: MatrixMut<'a, M>) -> Arg<'a, M> {
        out.boxes([LINE, LINE])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const H100: Gpu = Gpu { capability: (9, 0), multiprocessors: 132 };

    proptest! {
        #[test]
        fn every_cluster_has_a_tile_and_every_multiprocessor_a_block(rows in 1..100_000u32, cols in 1..12_500u32, depth in 1..1000u32) {
            let product = product(H100, Kernel::LoraForwardYWide, [rows, 8 * cols], 8 * depth).unwrap();
            let Product { plan, cols: width, cluster, .. } = product;
            let clusters = u64::from(rows.div_ceil(128 * cluster)) * u64::from((8 * cols).div_ceil(width));
            prop_assert_eq!(u64::from(plan.grid), (clusters * u64::from(cluster)).min(132));
            prop_assert!(product.plan.shared <= 227 << 10);
            prop_assert!(product.plan.kernel.name().ends_with(&product.cols.to_string()));
        }
    }

    #[test]
    fn only_hopper_takes_products_for_tensor_cores_with_whole_rows() {
        let take = |gpu, sizes, depth| product(gpu, Kernel::LoraForwardYWide, sizes, depth).map(|product| product.plan);
        let plan = |kernel, grid, shared| Some(Plan { kernel, grid, block: 384, shared });
        assert_eq!(take(H100, [4096, 4096], 4096), plan(Kernel::LoraForwardYHopper256, 132, 225 << 10));
        assert_eq!(take(H100, [1, 8], 8), plan(Kernel::LoraForwardYHopper128, 1, 201 << 10));
        for (sizes, depth) in [([0, 128], 64), ([128, 0], 64), ([128, 128], 0), ([128, 4], 64), ([128, 128], 12)] {
            assert_eq!(take(H100, sizes, depth), None);
        }
        for capability in [(8, 0), (8, 9), (10, 0), (12, 0)] {
            assert_eq!(take(Gpu { capability, ..H100 }, [128, 128], 64), None);
        }
        for kernel in [Kernel::LoraForwardY, Kernel::LoraForwardYSkinny, Kernel::LoraMerge] {
            assert_eq!(product(H100, kernel, [128, 128], 64), None);
        }
    }
}
