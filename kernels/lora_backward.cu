#include "band.cuh"
#include "engine.cuh"
#include "narrow_down.cuh"

struct DyMemory {
    Band band;
    float q[BAND][PASS];            // rows of B, 16 KiB
    float along[WARPS][STEP][PASS]; // what each warp adds along its 32 columns, 8 KiB
};

// dh = scale·dy·B, dB = scale·dyᵀ·h, dbias = Σ dy, from one reading of dy (for each 16 of rank): what is written are parts, dh one
// for every band of columns, dB and dbias one for every share of the rows. m·n elements are read; for m = n = 4096, r = 16 the
// parts are 16 times dh and 16 times dB, 8 MiB, which mostly stay in the L2 cache.
KERNEL(lora_backward_dy)(const E* b, const float* h, const E* dy, float scale, float* dh, float* db, float* dbias,
                         int m, int n, int r, int rows_a_share, int b_stride, int dy_stride) {
    let_next_begin();
    __shared__ __align__(16) DyMemory memory;
    Place place(m, n, r, rows_a_share);
    int col = place.first_col + int(threadIdx.x);
#pragma unroll 4
    for (int d = 0; d < PASS; ++d)
        memory.q[threadIdx.x][d] = element_or_zero(&b[at(col, place.first_d + d, b_stride)], col < n && place.first_d + d < r);
    float sum[PASS] = {}, rows_sum = 0.0f;
#pragma unroll 1
    for (int row = place.first_row; row < place.last_row; row += STEP) {
        load_step(memory.band, dy, dy_stride, h, place, row, n, r, [](int, int) {});
        add_down(memory.band, sum);
#pragma unroll 4
        for (int i = 0; i < STEP; ++i) rows_sum += memory.band.z[i][threadIdx.x];

        // Along: a warp has 32 columns; a lane rows `high` and `high` + 8, and four columns of dh.
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
            *reinterpret_cast<float4*>(&memory.along[warp()][high + half * 8][low]) =
                make_float4(part[half][0], part[half][1], part[half][2], part[half][3]);
        __syncthreads();
        int i = int(threadIdx.x / PASS), d = int(threadIdx.x % PASS);
        float all = 0.0f;
#pragma unroll
        for (int other = 0; other < WARPS; ++other) all += memory.along[other][i][d];
        if (row + i < place.last_row && place.first_d + d < r)
            dh[size_t(place.band) * m * r + at(row + i, place.first_d + d, r)] = scale * all;
    }
    if (col >= n) return;
    float* to = &db[size_t(place.share) * n * r];
    each_down(memory.band, sum, place, r, [&](int d, float sum) { to[at(col, d, r)] = scale * sum; });
    if (dbias && place.first_d == 0) dbias[size_t(place.share) * n + col] = rows_sum;
}

// dA = dhᵀ·drop(x), one part for every share of the rows
KERNEL(lora_backward_da)(const E* x, const float* dh, unsigned key0, unsigned key1, unsigned threshold, float keep_scale,
                         float* da, int m, int k, int r, int rows_a_share, int x_stride) {
    let_next_begin();
    wait_for_launch_before();
    __shared__ __align__(16) Band band;
    Place place(m, k, r, rows_a_share);
    Dropout dropout{key0, key1, threshold, keep_scale};
    float sum[PASS] = {};
#pragma unroll 1
    for (int row = place.first_row; row < place.last_row; row += STEP) {
        load_step(band, x, x_stride, dh, place, row, k, r, [&](int row, int col) {
            if (threshold == 0) return;
#pragma unroll 1
            for (int i = 0; i < STEP; ++i) band.z[i][threadIdx.x] *= dropout.factor(at(row + i, col, k));
        });
        add_down(band, sum);
        __syncthreads();
    }
    int col = place.first_col + int(threadIdx.x);
    if (col >= k) return;
    float* to = &da[size_t(place.share) * r * k];
    each_down(band, sum, place, r, [&](int d, float sum) { to[at(d, col, k)] = sum; });
}

// to = Σ parts, in their order; for three outputs, an element a thread
KERNEL(lora_backward_sum)(const float* parts0, const float* parts1, const float* parts2, float* to0, float* to1, float* to2,
                          size_t len0, size_t len1, size_t len2, int count0, int count1, int count2) {
    let_next_begin();
    wait_for_launch_before();
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

// dx = dy·W + drop(dh·A); the mask multiplies the first product, before the second joins its sums. Without W only the update. dx is
// overwritten, or added to.
KERNEL(lora_backward_dx)(const E* w, const E* a, const E* dy, const float* dh, unsigned key0, unsigned key1,
                         unsigned threshold, float keep_scale, E* dx, int m, int k, int n, int r,
                         int w_stride, int a_stride, int dy_stride, int dx_stride, unsigned adds) {
    wait_for_launch_before();
    Dropout dropout{key0, key1, threshold, keep_scale};
    Tile tile(m, k);
    tile.add(rows(dh, m, r), columns(a, k, r, a_stride));
    if (threshold > 0) tile.change([&](int i, int j, float sum) { return sum * dropout.factor(at(i, j, k)); });
    if (w) tile.add(rows(dy, m, n, dy_stride), columns(w, k, n, w_stride));
    tile.each([&](int i, int j, float sum) { put(&dx[at(i, j, dx_stride)], sum, adds); });
}

constexpr int SMALL = 16;  // a rank up to which A comes early, and dh and A to shared memory

// dx = dy·W + drop(dh·A) for few rows; without W only the update. It reads n·k + r·k elements from memory once for every 16 rows,
// later ones from the L2 cache, and in each of the k/32 blocks m·n from there. dh is needed last: it is made while W passes by.
KERNEL(lora_backward_dx_narrow)(const E* w, const E* a, const E* dy, const float* dh, unsigned key0, unsigned key1,
                                unsigned threshold, float keep_scale, E* dx, int m, int k, int n, int r,
                                int w_stride, int a_stride, int dy_stride, int dx_stride, unsigned adds) {
    __shared__ float made[ROWS][SMALL], across[SMALL][STRIP];
    NarrowDown tile(dy, w, m, k, n, dy_stride, w_stride);
    bool small = r <= SMALL;
    if (small) {
#pragma unroll
        for (int part = 0; part < SMALL * STRIP / THREADS; ++part) {
            int d = int((part * THREADS + threadIdx.x) / STRIP), j = int((part * THREADS + threadIdx.x) % STRIP);
            across[d][j] = element_or_zero(&a[at(d, tile.first_col + j, a_stride)], d < r && tile.first_col + j < k);
        }
    }
    tile.multiply_all();
    wait_for_launch_before();
    if (small) {
        int row = tile.first_row + int(threadIdx.x / SMALL), rank = int(threadIdx.x % SMALL);
        made[threadIdx.x / SMALL][rank] = row < m && rank < r ? dh[at(row, rank, r)] : 0.0f;
        __syncthreads();
    }
    Dropout dropout{key0, key1, threshold, keep_scale};
#pragma unroll 1
    for (unsigned e = threadIdx.x; e < ROWS * STRIP; e += THREADS) {
        int i = tile.first_row + int(e / STRIP), j = tile.first_col + int(e % STRIP);
        if (i >= m || j >= k) continue;
        float update = 0.0f;
        if (small) {
#pragma unroll 4
            for (int d = 0; d < SMALL; ++d) update += made[e / STRIP][d] * across[d][e % STRIP];
        } else {
#pragma unroll 4
            for (int d = 0; d < r; ++d) update += dh[at(i, d, r)] * widen(a[at(d, j, a_stride)]);
        }
        float sum = tile.sum(int(e / STRIP), int(e % STRIP)) + dropout.factor(at(i, j, k)) * update;
        put(&dx[at(i, j, dx_stride)], sum, adds);
    }
}
