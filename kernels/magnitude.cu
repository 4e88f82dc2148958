#include "common.cuh"

// A zero row has no direction: its factor is 0.
__device__ inline float divide_by_norm(float over, float norm) { return norm == 0.0f ? 0.0f : over / norm; }

constexpr int MAGNITUDE_ROWS = 8;  // rows of a block, of THREADS columns

// y = (magnitude / norm)·z + bias, by columns. Blocks are numbered row by row over the output.
KERNEL(magnitude)(const E* z, const E* magnitude, const float* norm, const E* bias, E* y, int m, int n) {
    unsigned across = unsigned(n - 1) / THREADS + 1;
    int first = int(blockIdx.x / across) * MAGNITUDE_ROWS;
    int j = int(blockIdx.x % across) * THREADS + threadIdx.x;
    if (j >= n) return;
    float factor = divide_by_norm(widen(magnitude[j]), norm[j]), added = bias ? widen(bias[j]) : 0.0f;
#pragma unroll 1
    for (int i = first; i < m && i < first + MAGNITUDE_ROWS; ++i) store(&y[at(i, j, n)], factor * widen(z[at(i, j, n)]) + added);
}

// dmagnitude = Σ dy·z / norm over the rows; a block has WARP columns, and each of its warps sums every eighth row.
KERNEL(magnitude_backward)(const E* z, const float* norm, const E* dy, float* dmagnitude, int m, int n) {
    __shared__ float partial[WARPS][WARP];
    int j = int(blockIdx.x * WARP) + lane();
    float sum = 0.0f;
    for (int i = warp(); j < n && i < m; i += WARPS) sum += widen(dy[at(i, j, n)]) * widen(z[at(i, j, n)]);
    partial[warp()][lane()] = sum;
    __syncthreads();
    if (warp() > 0 || j >= n) return;
    for (int other = 1; other < WARPS; ++other) sum += partial[other][lane()];
    dmagnitude[j] = divide_by_norm(sum, norm[j]);
}
