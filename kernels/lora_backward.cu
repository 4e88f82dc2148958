#include "band.cuh"
#include "engine.cuh"
#include "skinny_n_major.cuh"

struct DyMemory {
    Band band;
    float q[BAND_COLS][BAND_RANKS];                // rows of B, 16 KiB
    float row_sums[WARPS][BAND_ROWS][BAND_RANKS];  // of each warp's 32 columns, 8 KiB
};

// dh = scale·dy·B, dB = scale·dyᵀ·h, dbias = Σ dy
//
// dy is read once for every 16 of rank. The outputs are partial sums: one dh for every band of columns, one dB and dbias for
// every share of the rows. For m = n = 4096 and r = 16 that is 16 times dh and 16 times dB: 8 MiB, most of which stays in the L2
// cache.
KERNEL(lora_backward_dy)(const E* b, const float* h, const E* dy, float scale, float* dh, float* db, float* dbias,
                         int m, int n, int r, int rows_per_share, int b_stride, int dy_stride) {
    launch_dependents();
    __shared__ __align__(16) DyMemory memory;
    BandBlock block(m, n, r, rows_per_share);
    int col = block.first_col + int(threadIdx.x);
#pragma unroll 4
    for (int d = 0; d < BAND_RANKS; ++d)
        memory.q[threadIdx.x][d] = element_or_zero(&b[at(col, block.first_d + d, b_stride)], col < n && block.first_d + d < r);
    float sum[BAND_RANKS] = {}, rows_sum = 0.0f;
#pragma unroll 1
    for (int row = block.first_row; row < block.last_row; row += BAND_ROWS) {
        load_step(memory.band, dy, dy_stride, h, block, row, n, r, [](int, int) {});
        add_column_products(memory.band, sum);
#pragma unroll 4
        for (int i = 0; i < BAND_ROWS; ++i) rows_sum += memory.band.z[i][threadIdx.x];

        // Row sums: a warp has 32 columns, a lane rows `high` and `high` + 8, and four columns of dh.
        int high = int(threadIdx.x % 8), low = int(threadIdx.x % WARP / 8) * 4;
        float part[2][4] = {};
#pragma unroll 2
        for (int c = warp() * WARP; c < warp() * WARP + WARP; ++c) {
            float4 q = *reinterpret_cast<const float4*>(&memory.q[c][low]);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float z = memory.band.z[high + half * 8][c];
                part[half][0] += z * q.x, part[half][1] += z * q.y, part[half][2] += z * q.z, part[half][3] += z * q.w;
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half)
            *reinterpret_cast<float4*>(&memory.row_sums[warp()][high + half * 8][low]) =
                make_float4(part[half][0], part[half][1], part[half][2], part[half][3]);
        __syncthreads();
        int i = int(threadIdx.x / BAND_RANKS), d = int(threadIdx.x % BAND_RANKS);
        float all = 0.0f;
#pragma unroll
        for (int other = 0; other < WARPS; ++other) all += memory.row_sums[other][i][d];
        if (row + i < block.last_row && block.first_d + d < r)
            dh[size_t(block.band) * m * r + at(row + i, block.first_d + d, r)] = scale * all;
    }
    if (col >= n) return;
    float* to = &db[size_t(block.share) * n * r];
    each_column_sum(memory.band, sum, block, r, [&](int d, float sum) { to[at(col, d, r)] = scale * sum; });
    if (dbias && block.first_d == 0) dbias[size_t(block.share) * n + col] = rows_sum;
}

// dA = dhᵀ·drop(x); one partial sum for every share of the rows
KERNEL(lora_backward_da)(const E* x, const float* dh, unsigned key0, unsigned key1, unsigned threshold, float keep_scale,
                         float* da, int m, int k, int r, int rows_per_share, int x_stride) {
    launch_dependents();
    wait_for_previous_launch();
    __shared__ __align__(16) Band band;
    BandBlock block(m, k, r, rows_per_share);
    Dropout dropout{key0, key1, threshold, keep_scale};
    float sum[BAND_RANKS] = {};
#pragma unroll 1
    for (int row = block.first_row; row < block.last_row; row += BAND_ROWS) {
        load_step(band, x, x_stride, dh, block, row, k, r, [&](int row, int col) {
            if (threshold == 0) return;
#pragma unroll 1
            for (int i = 0; i < BAND_ROWS; ++i) band.z[i][threadIdx.x] *= dropout.factor(at(row + i, col, k));
        });
        add_column_products(band, sum);
        __syncthreads();
    }
    int col = block.first_col + int(threadIdx.x);
    if (col >= k) return;
    float* to = &da[size_t(block.share) * r * k];
    each_column_sum(band, sum, block, r, [&](int d, float sum) { to[at(d, col, k)] = sum; });
}

// to = Σ parts, in order; for three outputs, one thread per element
KERNEL(lora_backward_sum)(const float* parts0, const float* parts1, const float* parts2, float* to0, float* to1, float* to2,
                          size_t len0, size_t len1, size_t len2, int count0, int count1, int count2) {
    launch_dependents();
    wait_for_previous_launch();
    size_t i = element();
    bool second = i >= len0, third = second && i - len0 >= len1;
    i -= third ? len0 + len1 : second ? len0 : 0;
    const float* parts = third ? parts2 : second ? parts1 : parts0;
    float* to = third ? to2 : second ? to1 : to0;
    size_t len = third ? len2 : second ? len1 : len0;
    int count = third ? count2 : second ? count1 : count0;
    if (i >= len) return;
    float sum = 0.0f;
#pragma unroll 4
    for (int part = 0; part < count; ++part) sum += parts[part * len + i];
    to[i] = sum;
}

// dx = dy·W + drop(dh·A)
//
// The mask applies to the update alone, so the update comes first. w = null: only the update. dx is overwritten, or accumulated
// into.
KERNEL(lora_backward_dx)(const E* w, const E* a, const E* dy, const float* dh, unsigned key0, unsigned key1,
                         unsigned threshold, float keep_scale, E* dx, int m, int k, int n, int r,
                         int w_stride, int a_stride, int dy_stride, int dx_stride, unsigned accumulate) {
    wait_for_previous_launch();
    Dropout dropout{key0, key1, threshold, keep_scale};
    Tile tile(m, k);
    tile.add(rows(dh, m, r), columns(a, k, r, a_stride));
    if (threshold > 0) tile.transform([&](int i, int j, float sum) { return sum * dropout.factor(at(i, j, k)); });
    if (w) tile.add(rows(dy, m, n, dy_stride), columns(w, k, n, w_stride));
    tile.each([&](int i, int j, float sum) { store_output(&dx[at(i, j, dx_stride)], sum, accumulate); });
}

constexpr int DX_RANKS = 16;  // up to this rank A is loaded early, and dh and A are staged in shared memory

// dx = dy·W + drop(dh·A), for few rows; w = null: only the update
//
// Every 16 rows of dx read n·k + r·k elements, from memory for the first 16, then from the L2 cache; each of the k/32 blocks
// reads m·n from the L2 cache. dh is needed last: the previous launch makes it while W is read.
KERNEL(lora_backward_dx_skinny)(const E* w, const E* a, const E* dy, const float* dh, unsigned key0, unsigned key1,
                                unsigned threshold, float keep_scale, E* dx, int m, int k, int n, int r,
                                int w_stride, int a_stride, int dy_stride, int dx_stride, unsigned accumulate) {
    __shared__ float dh_tile[SKINNY_ROWS][DX_RANKS], a_tile[DX_RANKS][STRIP_COLS];
    SkinnyNMajor tile(dy, w, m, k, n, dy_stride, w_stride);
    bool rank_fits = r <= DX_RANKS;
    if (rank_fits) {
#pragma unroll
        for (int part = 0; part < DX_RANKS * STRIP_COLS / THREADS; ++part) {
            int d = int((part * THREADS + threadIdx.x) / STRIP_COLS), j = int((part * THREADS + threadIdx.x) % STRIP_COLS);
            a_tile[d][j] = element_or_zero(&a[at(d, tile.first_col + j, a_stride)], d < r && tile.first_col + j < k);
        }
    }
    tile.run();
    wait_for_previous_launch();
    if (rank_fits) {
        int row = tile.first_row + int(threadIdx.x / DX_RANKS), rank = int(threadIdx.x % DX_RANKS);
        dh_tile[threadIdx.x / DX_RANKS][rank] = row < m && rank < r ? dh[at(row, rank, r)] : 0.0f;
        __syncthreads();
    }
    Dropout dropout{key0, key1, threshold, keep_scale};
#pragma unroll 1
    for (unsigned e = threadIdx.x; e < SKINNY_ROWS * STRIP_COLS; e += THREADS) {
        int i = tile.first_row + int(e / STRIP_COLS), j = tile.first_col + int(e % STRIP_COLS);
        if (i >= m || j >= k) continue;
        float update = 0.0f;
        if (rank_fits) {
#pragma unroll 4
            for (int d = 0; d < DX_RANKS; ++d) update += dh_tile[e / STRIP_COLS][d] * a_tile[d][e % STRIP_COLS];
        } else {
#pragma unroll 4
            for (int d = 0; d < r; ++d) update += dh[at(i, d, r)] * widen(a[at(d, j, a_stride)]);
        }
        float sum = tile.sum(int(e / STRIP_COLS), int(e % STRIP_COLS)) + dropout.factor(at(i, j, k)) * update;
        store_output(&dx[at(i, j, dx_stride)], sum, accumulate);
    }
}
