#include "engine.cuh"

// A layer without an update is one of rank 0: y = x·Wᵀ + bias and dx = dy·W are lora_forward_y and lora_backward_dx with r = 0.

// dW = dyᵀ·x
KERNEL(linear_backward_dw)(const E* x, const E* dy, float* dw, int m, int k, int n, int x_stride, int dy_stride) {
    Tile tile(n, k);
    tile.add(columns(dy, n, m, dy_stride), columns(x, k, m, x_stride));
    tile.each([&](int i, int j, float sum) { dw[at(i, j, k)] = sum; });
}

// dbias = Σ dy over the rows; a block has WARP columns, and each of its warps sums every eighth row.
KERNEL(linear_backward_dbias)(const E* dy, float* dbias, int m, int n, int dy_stride) {
    __shared__ float partial[WARPS][WARP];
    int j = int(blockIdx.x * WARP) + lane();
    float sum = 0.0f;
    for (int i = warp(); j < n && i < m; i += WARPS) sum += widen(dy[at(i, j, dy_stride)]);
    partial[warp()][lane()] = sum;
    __syncthreads();
    if (warp() > 0 || j >= n) return;
    for (int other = 1; other < WARPS; ++other) sum += partial[other][lane()];
    dbias[j] = sum;
}
