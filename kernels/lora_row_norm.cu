#include "common.cuh"

// norm = ‖W + scale·B·A‖ by rows
//
// A warp has NORM_ROWS rows. Each element is computed in a register, squared, and dropped. An element of A is read once for all
// of them.
constexpr int NORM_ROWS = 4;

KERNEL(lora_row_norm)(const E* w, const void* a, const void* b, float scale, float* norm, int n, int k, int r,
                      int w_stride, int a_stride, int b_stride, unsigned a_is_f32, unsigned b_is_f32) {
    Factor factor_a{a, a_stride, a_is_f32 != 0}, factor_b{b, b_stride, b_is_f32 != 0};
    int first = (int(blockIdx.x) * WARPS + warp()) * NORM_ROWS;
    if (first >= n) return;
    int row[NORM_ROWS];  // beyond the end: the last row again
#pragma unroll
    for (int q = 0; q < NORM_ROWS; ++q) row[q] = min(first + q, n - 1);
    float squares[NORM_ROWS] = {};
#pragma unroll 1
    for (int j = lane(); j < k; j += WARP) {
        float update[NORM_ROWS] = {};
#pragma unroll 2
        for (int d = 0; d < r; ++d) {
            float right = factor_a.get(d, j);
#pragma unroll
            for (int q = 0; q < NORM_ROWS; ++q) update[q] += factor_b.get(row[q], d) * right;
        }
#pragma unroll
        for (int q = 0; q < NORM_ROWS; ++q) {
            float weight = widen(w[at(row[q], j, w_stride)]) + scale * update[q];
            squares[q] += weight * weight;
        }
    }
#pragma unroll
    for (int q = 0; q < NORM_ROWS; ++q) {
        float square = warp_sum(squares[q]);
        if (lane() == 0 && first + q < n) norm[first + q] = sqrtf(square);
    }
}
