#include "common.cuh"

// norm = ‖W + scale·B·A‖ by rows. A warp makes the elements of NORMS rows, each in a register: it is squared, and gone. An
// element of A is read once for all of them.
constexpr int NORMS = 4;

KERNEL(lora_row_norm)(const E* w, const E* a, const E* b, float scale, float* norm, int n, int k, int r) {
    int first = (int(blockIdx.x) * WARPS + warp()) * NORMS;
    if (first >= n) return;
    int row[NORMS];  // beyond the end the last one again
#pragma unroll
    for (int q = 0; q < NORMS; ++q) row[q] = min(first + q, n - 1);
    float squares[NORMS] = {};
#pragma unroll 1
    for (int j = lane(); j < k; j += WARP) {
        float update[NORMS] = {};
#pragma unroll 2
        for (int d = 0; d < r; ++d) {
            float right = widen(a[at(d, j, k)]);
#pragma unroll
            for (int q = 0; q < NORMS; ++q) update[q] += widen(b[at(row[q], d, r)]) * right;
        }
#pragma unroll
        for (int q = 0; q < NORMS; ++q) {
            float weight = widen(w[at(row[q], j, k)]) + scale * update[q];
            squares[q] += weight * weight;
        }
    }
#pragma unroll
    for (int q = 0; q < NORMS; ++q) {
        float square = warp_sum(squares[q]);
        if (lane() == 0 && first + q < n) norm[first + q] = sqrtf(square);
    }
}
