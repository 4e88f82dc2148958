//! Sizes → which of the kernels for Hopper, and how many blocks. Pure arithmetic.

use super::device::{Arg, Gpu};
use super::operand::{Matrix, MatrixMut};
use super::plan::Plan;

/// Threads of a block: `HOPPER` in hopper.cuh.
const THREADS: u32 = 384;
/// Rows of a tile: `TALL` in hopper.cuh.
const TALL: u32 = 128;
/// Rows, and columns, of what a warpgroup stores at once; the depth of a stage: `LINE` and `DEEP` in hopper.cuh.
const LINE: u32 = 64;

/// 16-bit elements of 16 bytes.
const CHUNK: u32 = 8;

/// The kernels for tensor cores of any GPU, each with those that take its place: in tiles of 256 and of 128 columns.
const KERNELS: [(&str, [&str; 2]); 2] = [
    ("lora_backward_dx_wide", ["lora_backward_dx_hopper_256", "lora_backward_dx_hopper_128"]),
    ("lora_forward_y_wide", ["lora_forward_y_hopper_256", "lora_forward_y_hopper_128"]),
];

/// Every kernel of [`hopper_ptx`](super::hopper_ptx), for each of its element types.
pub fn kernels() -> impl Iterator<Item = &'static str> {
    KERNELS.into_iter().flat_map(|(_, kernels)| kernels)
}

/// A kernel, its grid, and the boxes in which its operands move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Product {
    /// The kernel and its grid: as many blocks as multiprocessors, or as tiles of whole clusters if those are fewer.
    pub plan: Plan,
    /// Columns of a tile.
    cols: u32,
    /// Blocks of a cluster, which make tiles below each other and bring their right panel together.
    cluster: u32,
    /// Whether neighbours of the right side are neighbours in row, as they are of the weight in `dy·W`.
    along: bool,
}

/// What takes the place of `kernel` on Hopper, for an output of `rows × cols` and a sum so deep. None: on no other GPU, for no other
/// kernels than those for tensor cores, and not where rows are no whole multiples of 16 bytes.
pub fn product(gpu: Gpu, kernel: &str, [rows, cols]: [u32; 2], depth: u32) -> Option<Product> {
    let whole = |size: u32| size > 0 && size.is_multiple_of(CHUNK);
    let (_, kernels) = KERNELS.into_iter().find(|(name, _)| *name == kernel)?;
    if gpu.capability != (9, 0) || rows == 0 || !whole(cols) || !whole(depth) {
        return None;
    }
    let clusters = |width: u32| u64::from(rows.div_ceil(TALL * cluster(width))) * u64::from(cols.div_ceil(width));
    let room = |width: u32| u64::from(gpu.multiprocessors / cluster(width)).max(1);
    // How long it takes: rounds of tiles, and a narrow one has half the columns, at nine tenths of the speed.
    let rounds = |width: u32| clusters(width).div_ceil(room(width));
    let is_wide = gpu.multiprocessors >= cluster(256) && rounds(256) * 18 <= rounds(128) * 10;
    let along = kernel.starts_with("lora_backward_dx");
    let (kernel, width) = if is_wide { (kernels[0], 256) } else { (kernels[1], 128) };
    u32::try_from(clusters(width)).ok().filter(|&clusters| clusters <= i32::MAX as u32)?;
    let grid = clusters(width).min(room(width)) as u32 * cluster(width);
    let plan = Plan { kernel, grid, block: THREADS, shared: shared(width) };
    Some(Product { plan, cols: width, cluster: cluster(width), along })
}

/// What takes the place of a planned `lhs·Wᵀ` or `lhs·W` on Hopper, where rows of all operands start at multiples of 16 bytes and `out`
/// is overwritten: what it holds TMA does not bring.
pub(super) fn products<M>(
    gpu: Gpu,
    plan: Plan,
    lhs: &Matrix<'_, M>,
    w: Option<&Matrix<'_, M>>,
    out: &MatrixMut<'_, M>,
    adds: bool,
) -> Option<Product> {
    let takes = !adds && lhs.aligned && out.aligned && w.is_some_and(|w| w.aligned);
    takes.then(|| product(gpu, plan.kernel, [out.rows, out.cols], lhs.cols)).flatten()
}

/// `CLUSTER` in hopper.cuh.
fn cluster(cols: u32) -> u32 {
    if cols == 256 { 2 } else { 1 }
}

/// Bytes of shared memory: `Shared` in hopper.cuh. Stages, sums on their way out, a chunk of the update, and the barriers.
fn shared(cols: u32) -> u32 {
    let stages = if cols == 256 { 3 } else { 5 };
    let (stage, out, chunk) = (2 * LINE * (TALL + cols), 2 * TALL * cols, 4 * 16 * cols);
    let barriers = 8 * (2 * stages + 2);
    (stages * stage + out + chunk + barriers).next_multiple_of(1024)
}

impl Product {
    /// The left side, `rows × depth`.
    pub(super) fn lhs<'a, M>(&self, lhs: Matrix<'a, M>) -> Arg<'a, M> {
        lhs.boxes([TALL, LINE])
    }

    /// The right side, as it is stored; a block brings its share of the cluster's panel.
    pub(super) fn rhs<'a, M>(&self, rhs: Matrix<'a, M>) -> Arg<'a, M> {
        rhs.boxes([if self.along { LINE } else { self.cols / self.cluster }, LINE])
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
        fn every_cluster_has_a_tile_and_no_multiprocessor_waits(rows in 1..100_000u32, cols in 1..12_500u32, depth in 1..1000u32) {
            let product = product(H100, "lora_forward_y_wide", [rows, 8 * cols], 8 * depth).unwrap();
            let Product { plan, cols: width, cluster, .. } = product;
            let clusters = u64::from(rows.div_ceil(128 * cluster)) * u64::from((8 * cols).div_ceil(width));
            prop_assert_eq!(u64::from(plan.grid), (clusters * u64::from(cluster)).min(132));
            prop_assert!(product.plan.shared <= 227 << 10);
            prop_assert!(product.plan.kernel.ends_with(&product.cols.to_string()));
        }
    }

    #[test]
    fn only_hopper_takes_products_for_tensor_cores_with_whole_rows() {
        let take = |gpu, sizes, depth| product(gpu, "lora_forward_y_wide", sizes, depth).map(|product| product.plan);
        let plan = |kernel, grid, shared| Some(Plan { kernel, grid, block: 384, shared });
        assert_eq!(take(H100, [4096, 4096], 4096), plan("lora_forward_y_hopper_256", 132, 225 << 10));
        assert_eq!(take(H100, [1, 8], 8), plan("lora_forward_y_hopper_128", 1, 201 << 10));
        for (sizes, depth) in [([0, 128], 64), ([128, 0], 64), ([128, 128], 0), ([128, 4], 64), ([128, 128], 12)] {
            assert_eq!(take(H100, sizes, depth), None);
        }
        for capability in [(8, 0), (8, 9), (10, 0), (12, 0)] {
            assert_eq!(take(Gpu { capability, ..H100 }, [128, 128], 64), None);
        }
        for kernel in ["lora_forward_y", "lora_forward_y_narrow", "lora_merge"] {
            assert_eq!(product(H100, kernel, [128, 128], 64), None);
        }
    }
}
