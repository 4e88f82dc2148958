#include "engine.cuh"
#include "skinny.cuh"

// h = drop(x)·Aᵀ, for any shape
KERNEL(lora_forward_h)(const E* x, const E* a, unsigned key0, unsigned key1, unsigned threshold, float keep_scale, float* h,
                       int m, int k, int r, int x_stride, int a_stride) {
    launch_dependents();
    Tile tile(m, r);
    tile.add(drop(rows(x, m, k, x_stride), {key0, key1, threshold, keep_scale}), rows(a, r, k, a_stride));
    tile.each([&](int i, int j, float sum) { h[at(i, j, r)] = sum; });
}

// y = x·Wᵀ + bias + scale·h·Bᵀ, for any shape; w = null: only the update. y is overwritten, or accumulated into.
KERNEL(lora_forward_y)(const E* x, const E* w, const E* bias, const E* b, const float* h, float scale, E* y,
                       int m, int k, int n, int r, int x_stride, int w_stride, int b_stride, int y_stride, unsigned accumulate) {
    wait_for_previous_launch();
    Tile tile(m, n);
    tile.add(rows(h, m, r), rows(b, n, r, b_stride));
    tile.scale(scale);
    if (w) tile.add(rows(x, m, k, x_stride), rows(w, n, k, w_stride));
    tile.each([&](int i, int j, float sum) {
        store_output(&y[at(i, j, y_stride)], sum + (bias ? widen(bias[j]) : 0.0f), accumulate);
    });
}

constexpr int RANK_TILE = 16;  // columns of h in a block
constexpr int H_TILES = RANK_TILE / TILE_N;

// h = drop(x)·Aᵀ, for rows that start at multiples of 16 bytes
//
// A block reads 16 rows of x once, and 16 rows of A, which are in the L2 cache: m·k + m·r·k/16 elements. Blocks are numbered row
// by row over h. There is no dropout in f32, where each lane would need the mask of 16 rows.
KERNEL(lora_forward_h_skinny)(const E* x, const E* a, unsigned key0, unsigned key1, unsigned threshold, float keep_scale,
                              float* h, int m, int k, int r, int x_stride, int a_stride) {
    launch_dependents();
    unsigned across = unsigned(r - 1) / RANK_TILE + 1;
    int first_row = int(blockIdx.x / across) * SKINNY_ROWS, first_col = int(blockIdx.x % across) * RANK_TILE;
    Skinny<H_TILES, 1> tile(x, m, k, x_stride, first_row);
#pragma unroll
    for (int t = 0; t < H_TILES; ++t) {
        int j = first_col + t * TILE_N + tile.lane_row();
        tile.matrix_row[t] = j < r ? &a[at(j, 0, a_stride)] : nullptr;
    }
    Dropout dropout{key0, key1, threshold, keep_scale};
    tile.run([&](uint4& chunk, int i, int d) {
#ifdef TENSOR
        if (threshold == 0) return;
        dropout.mask(chunk.x, chunk.y, at(i, d, k));
        dropout.mask(chunk.z, chunk.w, at(i, d, k) + 4);
#endif
    });
    int i = int(threadIdx.x / RANK_TILE), j = int(threadIdx.x % RANK_TILE);
    if (first_row + i < m && first_col + j < r) h[at(first_row + i, first_col + j, r)] = dropout.keep_scale * tile.sum(i, j);
}

#ifdef TENSOR
constexpr int W_TILES = 4, A_TILES = 2;  // 32 rows of W, and all 16 of A
constexpr int STEPS_IN_FLIGHT = 2;       // 2·4 KiB of W for each of 8 warps and two blocks: 64 KiB a multiprocessor
#else
constexpr int W_TILES = 2, A_TILES = 0;
constexpr int STEPS_IN_FLIGHT = 1;  // no registers are left for more
#endif
constexpr int W_ROWS = W_TILES * TILE_N;

// y = x·Wᵀ + bias + scale·h·Bᵀ, for few rows; w = null: only the update
//
// With a ≠ null, of rank 16 at most, it also makes h = x·Aᵀ: the rows of A are treated as more rows of W, so that every block has
// the h of its rows after the loop, and the layer is one launch. It reads n·k + n·r elements from memory and, in each of the n/32
// blocks, r·k + m·k from the L2 cache: at r = 16 half as much again, which the L2 cache has bandwidth for (5 to 6 TB/s, memory 3
// to 4). Blocks with the same rows of W have consecutive numbers, so that they run together.
KERNEL(lora_forward_y_skinny)(const E* x, const E* w, const E* bias, const E* a, const E* b, float* h, float scale, E* y,
                              int m, int k, int n, int r, int x_stride, int w_stride, int a_stride, int b_stride, int y_stride,
                              unsigned accumulate) {
    __shared__ float h_tile[SKINNY_ROWS][RANK_TILE], b_tile[W_ROWS][RANK_TILE + 1];
    unsigned down = unsigned(m - 1) / SKINNY_ROWS + 1;
    int first_row = int(blockIdx.x % down) * SKINNY_ROWS, first_col = int(blockIdx.x / down) * W_ROWS;
    Skinny<W_TILES + A_TILES, STEPS_IN_FLIGHT> tile(x, m, k, x_stride, first_row);
#pragma unroll
    for (int t = 0; t < W_TILES + A_TILES; ++t) {
        int j = t * TILE_N + tile.lane_row(), row = t < W_TILES ? first_col + j : j - W_ROWS;
        const E* matrix = t < W_TILES ? w : a;
        int stride = t < W_TILES ? w_stride : a_stride;
        tile.matrix_row[t] = matrix && row < (t < W_TILES ? n : r) ? &matrix[at(row, 0, stride)] : nullptr;
    }
    // B is loaded while W is read, with zeros beyond the rank.
    bool makes_h = A_TILES > 0 && a, rank_fits = r <= RANK_TILE;
    int rank = int(threadIdx.x % RANK_TILE), row = first_row + int(threadIdx.x / RANK_TILE);
    if (rank_fits) {
#pragma unroll
        for (int part = 0; part < W_ROWS * RANK_TILE / THREADS; ++part) {
            int j = int((part * THREADS + threadIdx.x) / RANK_TILE);
            b_tile[j][rank] = element_or_zero(&b[at(first_col + j, rank, b_stride)], first_col + j < n && rank < r);
        }
    }
    tile.run([](uint4&, int, int) {});
    if (makes_h) {
        float sum = tile.sum(int(threadIdx.x / RANK_TILE), W_ROWS + rank);
        h_tile[threadIdx.x / RANK_TILE][rank] = sum;
        if (first_col == 0 && row < m && rank < r) h[at(row, rank, r)] = sum;
    } else {
        wait_for_previous_launch();  // makes h, while W is read
        if (rank_fits) h_tile[threadIdx.x / RANK_TILE][rank] = row < m && rank < r ? h[at(row, rank, r)] : 0.0f;
    }
    __syncthreads();
#pragma unroll 1
    for (unsigned e = threadIdx.x; e < SKINNY_ROWS * W_ROWS; e += THREADS) {
        int i = first_row + int(e / W_ROWS), j = first_col + int(e % W_ROWS);
        if (i >= m || j >= n) continue;
        float update = 0.0f;
        if (rank_fits) {
#pragma unroll 4
            for (int d = 0; d < RANK_TILE; ++d) update += h_tile[e / W_ROWS][d] * b_tile[e % W_ROWS][d];
        } else {
#pragma unroll 4
            for (int d = 0; d < r; ++d) update += h[at(i, d, r)] * widen(b[at(j, d, b_stride)]);
        }
        float sum = tile.sum(int(e / W_ROWS), int(e % W_ROWS)) + scale * update;
        store_output(&y[at(i, j, y_stride)], sum + (bias ? widen(bias[j]) : 0.0f), accumulate);
    }
}
