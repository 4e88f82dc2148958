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

// `value` rounded to one of its two neighbours in the first argument's type: away from zero if the low bits of `word` and what is
// to be cut off carry over; src/op/rounding.rs has the same function. From the largest number on it stays, for `store`.
__device__ inline float by_chance(__half, float value, unsigned word) {
    float size = fabsf(value);
    unsigned bits = __float_as_uint(value);
    if (!(size < 65504.0f)) return value;
    if (size >= 0x1p-14f) return __uint_as_float((bits + (word & 0x1fff)) & 0xffffe000u);
    unsigned parts = unsigned(size * 0x1p45f);  // below 2⁻¹⁴ the numbers are whole multiples of 2⁻²⁴, of 2²¹ parts each
    float cut = float((parts + (word & 0x1fffff)) >> 21) * 0x1p-24f;
    return __uint_as_float((bits & 0x80000000u) | __float_as_uint(cut));
}
__device__ inline float by_chance(__nv_bfloat16, float value, unsigned word) {
    if (!(fabsf(value) < 3.3895314e38f)) return value;
    return __uint_as_float((__float_as_uint(value) + (word & 0xffff)) & 0xffff0000u);
}

// The element of row i and column j of a row-major matrix. 64 bits: a matrix may have more elements than an int can count.
__device__ inline size_t at(int i, int j, int cols) { return size_t(i) * cols + j; }

// The element that this thread of a pointwise kernel is for.
__device__ inline size_t element() { return size_t(blockIdx.x) * THREADS + threadIdx.x; }

// Every lane gets the sum of the warp. The order is fixed: the same values give the same bits.
__device__ inline float warp_sum(float value) {
    for (int step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    return value;
}

// What a word decides; it keeps the words of a dropout mask and of roundings with the same seed apart.
constexpr unsigned DROPOUT = 0, ROUNDING = 2;

// Lane `lane` of the four words that Philox 4x32-10 makes of counter `block` in a stream; random.rs has the same function.
__device__ inline unsigned philox(unsigned key0, unsigned key1, unsigned long long block, int lane, unsigned stream) {
    unsigned c0 = unsigned(block), c1 = unsigned(block >> 32), c2 = stream, c3 = 0;
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
        return philox(key0, key1, index / 4, int(index % 4), DROPOUT) < threshold ? 0.0f : keep_scale;
    }
};
