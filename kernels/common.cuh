// What every kernel shares: the element type it is compiled for, and dropout.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// A module is compiled once per element type, with -DE=<type> -DELEMENT=<name>; KERNEL(add) is then add_f32, add_f16 or add_bf16.
#define JOIN_(stem, element) stem##_##element
#define JOIN(stem, element) JOIN_(stem, element)
#define KERNEL(stem) extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) JOIN(stem, ELEMENT)

// Threads a block, in every kernel, and blocks that a multiprocessor must have room for: that leaves a thread 128 registers.
constexpr int THREADS = 256;
constexpr int BLOCKS = 2;
constexpr int WARP = 32;

__device__ inline float widen(float value) { return value; }
__device__ inline float widen(__half value) { return __half2float(value); }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

// Rounds to nearest, ties to even.
__device__ inline void store(float* to, float value) { *to = value; }
__device__ inline void store(__half* to, float value) { *to = __float2half_rn(value); }
__device__ inline void store(__nv_bfloat16* to, float value) { *to = __float2bfloat16_rn(value); }

// The element of row i and column j of a row-major matrix. 64 bits: a matrix may have more elements than an int can count.
__device__ inline size_t at(int i, int j, int cols) { return size_t(i) * cols + j; }

// The element that this thread of a pointwise kernel is for.
__device__ inline size_t element() { return size_t(blockIdx.x) * THREADS + threadIdx.x; }

// Lane `lane` of the four words that Philox 4x32-10 makes of counter `block`; random.rs has the same function.
__device__ inline unsigned philox(unsigned key0, unsigned key1, unsigned long long block, int lane) {
    unsigned c0 = unsigned(block), c1 = unsigned(block >> 32), c2 = 0, c3 = 0;
#pragma unroll 1
    for (int round = 0; round < 10; ++round) {
        unsigned high0 = __umulhi(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
        unsigned high2 = __umulhi(c2, 0xCD9E8D57u), low2 = c2 * 0xCD9E8D57u;
        c0 = high2 ^ c1 ^ key0, c1 = low2, c2 = high0 ^ c3 ^ key1, c3 = low0;
        key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
    return lane < 2 ? (lane == 0 ? c0 : c1) : (lane == 2 ? c2 : c3);
}

// What element `index` is multiplied with: 0 if it is dropped, else keep_scale. No dropout is threshold 0 and keep_scale 1.
struct Dropout {
    unsigned key0, key1, threshold;
    float keep_scale;

    __device__ float factor(size_t index) const {
        if (threshold == 0) return keep_scale;
        return philox(key0, key1, index / 4, int(index % 4)) < threshold ? 0.0f : keep_scale;
    }
};
