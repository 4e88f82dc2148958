#include "engine.cuh"

// y = x·Wᵀ + bias
KERNEL(linear_forward)(const E* x, const E* w, const E* bias, E* y, int m, int k, int n) {
    Tile tile(m, n);
    tile.add(rows(x, m, k), rows(w, n, k));
    tile.each([&](int i, int j, float sum) { store(&y[at(i, j, n)], sum + (bias ? widen(bias[j]) : 0.0f)); });
}

// dx = dy·W
KERNEL(linear_backward_dx)(const E* w, const E* dy, E* dx, int m, int k, int n) {
    Tile tile(m, k);
    tile.add(rows(dy, m, n), columns(w, k, n));
    tile.each([&](int i, int j, float sum) { store(&dx[at(i, j, k)], sum); });
}

// dW = dyᵀ·x
KERNEL(linear_backward_dw)(const E* x, const E* dy, float* dw, int m, int k, int n) {
    Tile tile(n, k);
    tile.add(columns(dy, n, m), columns(x, k, m));
    tile.each([&](int i, int j, float sum) { dw[at(i, j, k)] = sum; });
}

// dbias = Σ dy over the rows; a block makes WARP columns, and each of its warps sums every eighth row.
KERNEL(linear_backward_dbias)(const E* dy, float* dbias, int m, int n) {
    constexpr int WARPS = THREADS / WARP;
    __shared__ float partial[WARPS][WARP];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, j = blockIdx.x * WARP + lane;
    float sum = 0.0f;
    for (int i = warp; j < n && i < m; i += WARPS) sum += widen(dy[at(i, j, n)]);
    partial[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || j >= n) return;
    for (int other = 1; other < WARPS; ++other) sum += partial[other][lane];
    dbias[j] = sum;
}
