// Shared by all kernels: the element type, conversions, loads with bounds checks, random words, and dropout.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// A module is compiled once per element type, with -DE=<type> -DELEMENT=<name>; KERNEL(add) is then add_f32, add_f16 or add_bf16.
#define JOIN_(stem, element) stem##_##element
#define JOIN(stem, element) JOIN_(stem, element)
#define KERNEL(stem) extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) JOIN(stem, ELEMENT)

// Threads of a block, in every kernel, and blocks that must fit on a multiprocessor: a thread then has at most 128 registers.
constexpr int THREADS = 256;
constexpr int BLOCKS = 2;
constexpr int WARP = 32;
constexpr int WARPS = THREADS / WARP;

// Programmatic dependent launch: from Hopper on, consecutive launches of a verb overlap. The blocks of a launch may start once
// all blocks of the previous launch have called `launch_dependents` or ended. `wait_for_previous_launch` returns when the
// previous launch has ended and its writes are visible; since every launch of a verb waits, this holds for all earlier launches
// of the verb too. Before it, a kernel may read only what no launch of the verb writes (x, W, A, B, dy), and may write nothing.
// Older GPUs do not have the two instructions: in the PTX that ships they are comments that begin with `//@`, which
// `cuda::from_hopper_on` turns into instructions.
#if __CUDA_ARCH__ >= 900
#define FROM_HOPPER_ON ""
#else
#define FROM_HOPPER_ON "//@ "
#endif
__device__ inline void launch_dependents() { asm volatile(FROM_HOPPER_ON "griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ inline void wait_for_previous_launch() { asm volatile(FROM_HOPPER_ON "griddepcontrol.wait;" ::: "memory"); }

// Divided as unsigned: that compiles to a shift.
__device__ inline int lane() { return int(threadIdx.x % WARP); }
__device__ inline int warp() { return int(threadIdx.x / WARP); }

// f16 and bf16 differ only in the instructions written out here and in mma.cuh. So the PTX of f16 is that of bf16 with some words
// replaced (kernels/ptx.rs), and only bf16's ships.
__device__ inline float widen(float value) { return value; }
__device__ inline float widen(__half value) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(__half_as_ushort(value)));
    return result;
}
__device__ inline float widen(__nv_bfloat16 value) {
    float result;
    asm("mov.b32 %0, {0, %1};" : "=f"(result) : "h"(__bfloat16_as_ushort(value)));
    return result;
}

// Rounds to nearest, ties to even.
__device__ inline void store(float* to, float value) { *to = value; }
__device__ inline void store(__half* to, float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    *to = __ushort_as_half(bits);
}
__device__ inline void store(__nv_bfloat16* to, float value) {
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    *to = __ushort_as_bfloat16(bits);
}

// Stores the sum, or, if `accumulate`, what the output holds plus the sum. Rounded once.
__device__ inline void store_output(E* to, float sum, unsigned accumulate) { store(to, accumulate ? widen(*to) + sum : sum); }

// Constants for stochastic rounding to a type. `low_bits`: mask of the bits that f32 has and the type does not; `largest`: its
// largest number; `normal`: its smallest normal number, below which f16 has multiples of 2⁻²⁴. bf16 has as many exponents as f32.
struct Format { unsigned low_bits; float largest, normal; };
__device__ inline Format format(__half) {
    Format format;
    asm("mov.b32 %0, 0x1fff;\nmov.b32 %1, 0x477fe000;\nmov.b32 %2, 0x38800000;"
        : "=r"(format.low_bits), "=f"(format.largest), "=f"(format.normal));
    return format;
}
__device__ inline Format format(__nv_bfloat16) {
    Format format;
    asm("mov.b32 %0, 0xffff;\nmov.b32 %1, 0x7f7f0000;\nmov.b32 %2, 0x0;"
        : "=r"(format.low_bits), "=f"(format.largest), "=f"(format.normal));
    return format;
}

// Rounds `value` to one of its two neighbours in E: away from zero if the bits to be cut plus random bits of `word` carry. The
// same function as in src/op/rounding.rs. From the largest number on, `store` rounds.
__device__ inline float stochastic_round(Format format, float value, unsigned word) {
    float size = fabsf(value);
    unsigned bits = __float_as_uint(value);
    if (!(size < format.largest)) return value;
    if (size >= format.normal) return __uint_as_float((bits + (word & format.low_bits)) & ~format.low_bits);
    unsigned parts = unsigned(size * 0x1p45f);  // in units of 2⁻²⁴·2⁻²¹
    float cut = float((parts + (word & 0x1fffff)) >> 21) * 0x1p-24f;
    return __uint_as_float((bits & 0x80000000u) | __float_as_uint(cut));
}

// Elements in 16 bytes, the largest single access. A chunk is held as four 32-bit words.
constexpr int CHUNK = 16 / sizeof(E);
struct Chunk {
    uint4 bits;

    __device__ unsigned& word(int i) { return i == 0 ? bits.x : i == 1 ? bits.y : i == 2 ? bits.z : bits.w; }
    __device__ float get(int e) {
        if constexpr (CHUNK == 4) return __uint_as_float(word(e));
        unsigned short half = (unsigned short)(word(e / 2) >> e % 2 * 16);
        return widen(*reinterpret_cast<E*>(&half));
    }
    __device__ void set(int e, float value) {
        E element;
        store(&element, value);
        if constexpr (CHUNK == 4) {
            word(e) = __float_as_uint(value);
        } else {
            unsigned half = *reinterpret_cast<unsigned short*>(&element);
            word(e / 2) = e % 2 == 0 ? half : word(e / 2) | half << 16;  // callers set elements in order
        }
    }
};

// Loads 16 bytes of memory that no thread writes, or zeros. A predicated load, not a branch, so that many can be in flight.
__device__ inline uint4 load_or_zero(const E* from, bool has) {
    uint4 to;
    asm("{.reg .pred has;\nsetp.ne.b32 has, %5, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
        "@has ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];}"
        : "=&r"(to.x), "=&r"(to.y), "=&r"(to.z), "=&r"(to.w) : "l"(from), "r"(int(has)));
    return to;
}

// Loads one element of memory that no thread writes, or zero.
__device__ inline float element_or_zero(const E* from, bool has) {
    if constexpr (CHUNK == 4) {
        float value;
        asm("{.reg .pred has;\nsetp.ne.b32 has, %2, 0;\nmov.b32 %0, 0;\n@has ld.global.nc.f32 %0, [%1];}"
            : "=&f"(value) : "l"(from), "r"(int(has)));
        return value;
    } else {
        unsigned short bits;
        asm("{.reg .pred has;\nsetp.ne.b32 has, %2, 0;\nmov.b16 %0, 0;\n@has ld.global.nc.u16 %0, [%1];}"
            : "=&h"(bits) : "l"(from), "r"(int(has)));
        return widen(*reinterpret_cast<E*>(&bits));
    }
}

// Index of element (i, j) of a row-major matrix whose rows are `stride` elements apart. 64 bits: a matrix may have more than 2³¹
// elements.
__device__ inline size_t at(int i, int j, int stride) { return size_t(i) * stride + j; }

// A factor (A or B) that is read by elements: of the type E, or f32 beside 16-bit weights.
struct Factor {
    const void* data;
    int stride;
    bool is_f32;

    __device__ float get(int i, int j) const {
        size_t index = at(i, j, stride);
        if (CHUNK == 4 || is_f32) return static_cast<const float*>(data)[index];
        return widen(static_cast<const E*>(data)[index]);
    }

    __device__ float get_or_zero(int i, int j, bool has) const {
        size_t index = at(i, j, stride);
        if (is_f32 && CHUNK != 4) return has ? static_cast<const float*>(data)[index] : 0.0f;
        return element_or_zero(static_cast<const E*>(data) + index, has);
    }
};

// Index of the element that this thread of a pointwise kernel computes.
__device__ inline size_t element() { return size_t(blockIdx.x) * THREADS + threadIdx.x; }

// The sum over the warp, in every lane. The order is fixed, so the same values give the same bits.
__device__ inline float warp_sum(float value) {
    for (int step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    return value;
}

// Streams of random words: dropout masks and roundings with the same seed use different ones.
constexpr unsigned DROPOUT = 0, ROUNDING = 2;

// Philox 4x32-10: four random words for counter `block` of a stream, as in src/random.rs.
__device__ inline uint4 philox(unsigned key0, unsigned key1, unsigned long long block, unsigned stream) {
    unsigned c0 = unsigned(block), c1 = unsigned(block >> 32), c2 = stream, c3 = 0;
#pragma unroll 1
    for (int round = 0; round < 10; ++round) {
        unsigned high0 = __umulhi(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
        unsigned high2 = __umulhi(c2, 0xCD9E8D57u), low2 = c2 * 0xCD9E8D57u;
        c0 = high2 ^ c1 ^ key0, c1 = low2, c2 = high0 ^ c3 ^ key1, c3 = low0;
        key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
    return {c0, c1, c2, c3};
}

// The random word of element `index`. Four consecutive elements share a counter.
__device__ inline unsigned word_of(unsigned key0, unsigned key1, size_t index, unsigned stream) {
    uint4 words = philox(key0, key1, index / 4, stream);
    unsigned low = index % 2 ? words.y : words.x, high = index % 2 ? words.w : words.z;
    return index / 2 % 2 ? high : low;
}

// A dropout mask, recomputed from its seed. `factor` is 0 for a dropped element, else keep_scale. No dropout: threshold 0,
// keep_scale 1.
struct Dropout {
    unsigned key0, key1, threshold;
    float keep_scale;

    __device__ float factor(size_t index) const {
        if (threshold == 0) return keep_scale;
        return word_of(key0, key1, index, DROPOUT) < threshold ? 0.0f : keep_scale;
    }

    // Zeroes the dropped ones of four consecutive 16-bit elements, in two words; `index`, of the first, is a multiple of 4.
    __device__ void mask(unsigned& low, unsigned& high, size_t index) const {
        uint4 words = philox(key0, key1, index / 4, DROPOUT);
        low &= (words.x < threshold ? 0 : 0xffffu) | (words.y < threshold ? 0 : 0xffff0000u);
        high &= (words.z < threshold ? 0 : 0xffffu) | (words.w < threshold ? 0 : 0xffff0000u);
    }
};
