#include "common.cuh"

// The maximum over the warp, in every lane.
__device__ inline float warp_max(float value) {
    for (int step = WARP / 2; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, step));
    return value;
}

constexpr unsigned IGNORED = ~0u;  // the label of a row without one

// losses = -log softmax(logits)[label], dlogits = (softmax(logits) - onehot(label)) / counted; one warp per row. Rows without a
// label: both are 0.
KERNEL(cross_entropy_rows)(const E* logits, const unsigned* labels, float* losses, E* dlogits, int m, int n, int counted) {
    int i = int(blockIdx.x) * WARPS + warp(), lane = ::lane();
    if (i >= m) return;
    if (labels[i] == IGNORED) {
        if (lane == 0) losses[i] = 0.0f;
#pragma unroll 1
        for (int j = lane; j < n; j += WARP) store(&dlogits[at(i, j, n)], 0.0f);
        return;
    }
    float largest = -INFINITY, sum = 0.0f;
#pragma unroll 1
    for (int j = lane; j < n; j += WARP) largest = fmaxf(largest, widen(logits[at(i, j, n)]));
    largest = warp_max(largest);
#pragma unroll 1
    for (int j = lane; j < n; j += WARP) sum += expf(widen(logits[at(i, j, n)]) - largest);
    sum = warp_sum(sum);
    int label = int(labels[i]);
    if (lane == 0) losses[i] = logf(sum) - (widen(logits[at(i, label, n)]) - largest);
#pragma unroll 1
    for (int j = lane; j < n; j += WARP) {
        float softmax = expf(widen(logits[at(i, j, n)]) - largest) / sum;
        store(&dlogits[at(i, j, n)], (softmax - (j == label ? 1.0f : 0.0f)) / float(counted));
    }
}

// loss = Σ losses / counted, or 0 if no row has a label; one block
KERNEL(cross_entropy_mean)(const float* losses, float* loss, int m, int counted) {
    __shared__ float partial[WARPS];
    float sum = 0.0f;
#pragma unroll 1
    for (int i = int(threadIdx.x); i < m; i += THREADS) sum += losses[i];
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) partial[warp()] = sum;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int other = 1; other < WARPS; ++other) sum += partial[other];
    *loss = counted == 0 ? 0.0f : sum / float(counted);
}
