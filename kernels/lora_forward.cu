#include "engine.cuh"
#include "narrow.cuh"

// h = drop(x)·Aᵀ, for any shape
KERNEL(lora_forward_h)(const E* x, const E* a, unsigned key0, unsigned key1, unsigned threshold, float keep_scale, float* h,
                       int m, int k, int r, int x_stride, int a_stride) {
    let_next_begin();
    Tile tile(m, r);
    tile.add(drop(rows(x, m, k, x_stride), {key0, key1, threshold, keep_scale}), rows(a, r, k, a_stride));
    tile.each([&](int i, int j, float sum) { h[at(i, j, r)] = sum; });
}

// y = x·Wᵀ + bias + scale·h·Bᵀ, for any shape; without W only the update. y is overwritten, or added to.
KERNEL(lora_forward_y)(const E* x, const E* w, const E* bias, const E* b, const float* h, float scale, E* y,
                       int m, int k, int n, int r, int x_stride, int w_stride, int b_stride, int y_stride, unsigned adds) {
    wait_for_launch_before();
    Tile tile(m, n);
    tile.add(rows(h, m, r), rows(b, n, r, b_stride));
    tile.scale(scale);
    if (w) tile.add(rows(x, m, k, x_stride), rows(w, n, k, w_stride));
    tile.each([&](int i, int j, float sum) { put(&y[at(i, j, y_stride)], sum + (bias ? widen(bias[j]) : 0.0f), adds); });
}

constexpr int RANKS = 16;                    // columns of h that a block makes
constexpr int H_TILES = RANKS / GROUP;

// h = drop(x)·Aᵀ. A block reads 16 rows of x once, and 16 rows of A, which are in the L2 cache: m·k + m·r·k/16 elements.
// Blocks are numbered along the rows of h. In f32 nothing is dropped here: each lane would need the mask of 16 rows.
KERNEL(lora_forward_h_narrow)(const E* x, const E* a, unsigned key0, unsigned key1, unsigned threshold, float keep_scale,
                              float* h, int m, int k, int r, int x_stride, int a_stride) {
    let_next_begin();
    unsigned across = unsigned(r - 1) / RANKS + 1;
    int first_row = int(blockIdx.x / across) * ROWS, first_col = int(blockIdx.x % across) * RANKS;
    Narrow<H_TILES, 1> tile(x, m, k, x_stride, first_row);
#pragma unroll
    for (int t = 0; t < H_TILES; ++t) {
        int j = first_col + t * GROUP + tile.group();
        tile.line[t] = j < r ? &a[at(j, 0, a_stride)] : nullptr;
    }
    Dropout dropout{key0, key1, threshold, keep_scale};
    tile.multiply_all([&](uint4& chunk, int i, int d) {
#ifdef TENSOR
        if (threshold == 0) return;
        dropout.mask(chunk.x, chunk.y, at(i, d, k));
        dropout.mask(chunk.z, chunk.w, at(i, d, k) + 4);
#endif
    });
    int i = int(threadIdx.x / RANKS), j = int(threadIdx.x % RANKS);
    if (first_row + i < m && first_col + j < r) h[at(first_row + i, first_col + j, r)] = dropout.keep_scale * tile.sum(i, j);
}

#ifdef TENSOR
constexpr int W_TILES = 4, A_TILES = 2;      // 32 rows of W, and all 16 of A
constexpr int STEPS = 2;                     // 2·4 KiB of W for each of 8 warps: 64 KiB on their way to a multiprocessor
#else
constexpr int W_TILES = 2, A_TILES = 0;
constexpr int STEPS = 1;                     // its sums leave no registers for more
#endif
constexpr int W_ROWS = W_TILES * GROUP;

// y = x·Wᵀ + bias + scale·h·Bᵀ for few rows; without W only the update. With A, of rank 16 at most, it makes h = x·Aᵀ besides:
// its rows are more rows of the matrix that passes by, so every block has the h of its rows when the loop ends, and the whole
// layer is one launch. It reads n·k + n·r elements from memory and, in each of the n/32 blocks, r·k + m·k from the L2 cache: half
// as much again at r = 16, which that cache has room for (5 to 6 TB/s where memory gives 3 to 4).
// Blocks are numbered along the rows of y, so that those with the same rows of W run together.
KERNEL(lora_forward_y_narrow)(const E* x, const E* w, const E* bias, const E* a, const E* b, float* h, float scale, E* y,
                              int m, int k, int n, int r, int x_stride, int w_stride, int a_stride, int b_stride, int y_stride,
                              unsigned adds) {
    __shared__ float made[ROWS][RANKS], up[W_ROWS][RANKS + 1];
    unsigned down = unsigned(m - 1) / ROWS + 1;
    int first_row = int(blockIdx.x % down) * ROWS, first_col = int(blockIdx.x / down) * W_ROWS;
    Narrow<W_TILES + A_TILES, STEPS> tile(x, m, k, x_stride, first_row);
#pragma unroll
    for (int t = 0; t < W_TILES + A_TILES; ++t) {
        int j = t * GROUP + tile.group(), row = t < W_TILES ? first_col + j : j - W_ROWS;
        const E* matrix = t < W_TILES ? w : a;
        tile.line[t] = matrix && row < (t < W_TILES ? n : r) ? &matrix[at(row, 0, t < W_TILES ? w_stride : a_stride)] : nullptr;
    }
    // B is on its way while W passes by. Zeros beyond the rank.
    bool makes_h = A_TILES > 0 && a, small = r <= RANKS;
    int rank = int(threadIdx.x % RANKS), row = first_row + int(threadIdx.x / RANKS);
    if (small) {
#pragma unroll
        for (int part = 0; part < W_ROWS * RANKS / THREADS; ++part) {
            int j = int((part * THREADS + threadIdx.x) / RANKS);
            up[j][rank] = element_or_zero(&b[at(first_col + j, rank, b_stride)], first_col + j < n && rank < r);
        }
    }
    tile.multiply_all([](uint4&, int, int) {});
    if (makes_h) {
        float sum = tile.sum(int(threadIdx.x / RANKS), W_ROWS + rank);
        made[threadIdx.x / RANKS][rank] = sum;
        if (first_col == 0 && row < m && rank < r) h[at(row, rank, r)] = sum;
    } else {
        wait_for_launch_before();  // h is made while W passes by
        if (small) made[threadIdx.x / RANKS][rank] = row < m && rank < r ? h[at(row, rank, r)] : 0.0f;
    }
    __syncthreads();
#pragma unroll 1
    for (unsigned e = threadIdx.x; e < ROWS * W_ROWS; e += THREADS) {
        int i = first_row + int(e / W_ROWS), j = first_col + int(e % W_ROWS);
        if (i >= m || j >= n) continue;
        float update = 0.0f;
        if (small) {
#pragma unroll 4
            for (int d = 0; d < RANKS; ++d) update += made[e / W_ROWS][d] * up[e % W_ROWS][d];
        } else {
#pragma unroll 4
            for (int d = 0; d < r; ++d) update += h[at(i, d, r)] * widen(b[at(j, d, b_stride)]);
        }
        float sum = tile.sum(int(e / W_ROWS), int(e % W_ROWS)) + scale * update;
        put(&y[at(i, j, y_stride)], sum + (bias ? widen(bias[j]) : 0.0f), adds);
    }
}
