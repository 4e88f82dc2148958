#include "common.cuh"

// A row of zeros has no direction.
__device__ inline float by_norm(float over, float norm) { return norm == 0.0f ? 0.0f : over / norm; }

constexpr int STRIPE = 8;  // rows, of THREADS columns, that a block makes

// y = (magnitude / norm)·z + bias, column by column. Blocks are numbered along the rows.
KERNEL(magnitude)(const E* z, const E* magnitude, const float* norm, const E* bias, E* y, int m, int n) {
    unsigned across = unsigned(n - 1) / THREADS + 1;
    int first = int(blockIdx.x / across) * STRIPE;
    int j = int(blockIdx.x % across) * THREADS + threadIdx.x;
    if (j >= n) return;
    float factor = by_norm(widen(magnitude[j]), norm[j]), more = bias ? widen(bias[j]) : 0.0f;
#pragma unroll 1
    for (int i = first; i < m && i < first + STRIPE; ++i) store(&y[at(i, j, n)], factor * widen(z[at(i, j, n)]) + more);
}

// dmagnitude = Σ dy·z / norm over the rows; a block makes WARP columns, and each of its warps sums every eighth row.
KERNEL(magnitude_backward)(const E* z, const float* norm, const E* dy, float* dmagnitude, int m, int n) {
    __shared__ float partial[WARPS][WARP];
    int j = int(blockIdx.x * WARP) + lane();
    float sum = 0.0f;
    for (int i = warp(); j < n && i < m; i += WARPS) sum += widen(dy[at(i, j, n)]) * widen(z[at(i, j, n)]);
    partial[warp()][lane()] = sum;
    __syncthreads();
    if (warp() > 0 || j >= n) return;
    for (int other = 1; other < WARPS; ++other) sum += partial[other][lane()];
    dmagnitude[j] = by_norm(sum, norm[j]);
}
