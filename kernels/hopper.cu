#include "hopper.cuh"

// The big products on Hopper, for 16-bit elements whose rows start at multiples of 16 bytes. Each kernel exists with tiles of 256
// columns, and of 128 for outputs that would leave multiprocessors idle; the plan chooses.
#define MAP const __grid_constant__ TensorMap
#define ENTRY(stem, cols)                                                                           \
    extern "C" __global__ void __cluster_dims__(CLUSTER<cols>) __launch_bounds__(BLOCK_THREADS, 1) \
        JOIN(stem##_hopper_##cols, ELEMENT)
#define ENTRIES(stem, parameters, ...)                 \
    ENTRY(stem, 256) parameters { stem<256>(__VA_ARGS__); } \
    ENTRY(stem, 128) parameters { stem<128>(__VA_ARGS__); }

// Adds the bias, if there is one, to the sums of columns `col` and `col + 1`.
struct AddBias {
    const E* bias;
    int cols;
    __device__ void operator()(int col, float& first, float& second) const {
        if (!bias || col >= cols) return;
        unsigned pair = *reinterpret_cast<const unsigned*>(bias + col);
        first += widen(reinterpret_cast<const E*>(&pair)[0]);
        second += widen(reinterpret_cast<const E*>(&pair)[1]);
    }
};
struct NoBias {
    __device__ void operator()(int, float&, float&) const {}
};

// y = x·Wᵀ + bias + scale·h·Bᵀ
template <int COLS>
__device__ void lora_forward_y(const TensorMap& x, const TensorMap& w, const E* bias, const E* b, const float* h, float scale,
                               const TensorMap& y, int m, int k, int n, int r, int b_stride) {
    Update<Rows<E>> update{rows(h, m, r), rows(b, n, r, b_stride), scale};
    gemm_tiles<COLS, false>(x, w, y, m, n, k, update, AddBias{bias, n});
}
ENTRIES(lora_forward_y,
        (MAP x, MAP w, const E* bias, const E* b, const float* h, float scale, MAP y, int m, int k, int n, int r,
         int b_stride),
        x, w, bias, b, h, scale, y, m, k, n, r, b_stride)

// dx = dy·W + drop(dh·A)
template <int COLS>
__device__ void lora_backward_dx(const TensorMap& w, const E* a, const TensorMap& dy, const float* dh, Dropout dropout,
                                 const TensorMap& dx, int m, int k, int n, int r, int a_stride) {
    DroppedUpdate<Columns<E>> update{{rows(dh, m, r), columns(a, k, r, a_stride), 1.0f}, dropout};
    gemm_tiles<COLS, true>(dy, w, dx, m, k, n, update, NoBias());
}
ENTRIES(lora_backward_dx,
        (MAP w, const E* a, MAP dy, const float* dh, unsigned key0, unsigned key1, unsigned threshold, float keep_scale, MAP dx,
         int m, int k, int n, int r, int a_stride),
        w, a, dy, dh, Dropout{key0, key1, threshold, keep_scale}, dx, m, k, n, r, a_stride)
