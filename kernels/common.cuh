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
constexpr int WARPS = THREADS / WARP;

// From Hopper on a launch of a verb may begin before the one before it has ended (programmatic dependent launch): its blocks come
// as soon as all blocks of that one have called `let_next_begin` or ended. `wait_for_launch_before` returns when that one has ended
// and what it wrote is there; since that one waited too, this holds for all launches of the verb before. What no launch of the verb
// writes (x, W, A, B, dy) may be read before; nothing may be written before. Older GPUs know neither instruction: to them they are
// comments, `//@` in the PTX that ships, and `cuda::from_hopper_on` makes instructions of these.
#if __CUDA_ARCH__ >= 900
#define FROM_HOPPER_ON ""
#else
#define FROM_HOPPER_ON "//@ "
#endif
__device__ inline void let_next_begin() { asm volatile(FROM_HOPPER_ON "griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ inline void wait_for_launch_before() { asm volatile(FROM_HOPPER_ON "griddepcontrol.wait;" ::: "memory"); }

// Divided before they become signed: then dividing is shifting.
__device__ inline int lane() { return int(threadIdx.x % WARP); }
__device__ inline int warp() { return int(threadIdx.x / WARP); }

// The 16-bit types differ in the instructions that are written out here and in mma.cuh, and in no other: so the PTX of one is that
// of the other with some words exchanged (kernels/ptx.rs), and only one of them ships.
__device__ inline float widen(float value) { return value; }
__device__ inline float widen(__half value) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(__half_as_ushort(value)));
    return wide;
}
__device__ inline float widen(__nv_bfloat16 value) {
    float wide;
    asm("mov.b32 %0, {0, %1};" : "=f"(wide) : "h"(__bfloat16_as_ushort(value)));
    return wide;
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

// An output, of the type that is stored: the sum, or, if it adds, the sum and what it holds. Rounded once.
__device__ inline void put(E* to, float sum, unsigned adds) { store(to, adds ? widen(*to) + sum : sum); }

// What rounding by chance must know of a type: the bits that a float has more, its largest number, and from where on it has all of
// its digits; below, numbers are whole multiples of 2⁻²⁴. bf16 has as small ones as a float.
struct Format { unsigned rest; float largest, normal; };
__device__ inline Format format(__half) {
    Format format;
    asm("mov.b32 %0, 0x1fff;\nmov.b32 %1, 0x477fe000;\nmov.b32 %2, 0x38800000;"
        : "=r"(format.rest), "=f"(format.largest), "=f"(format.normal));
    return format;
}
__device__ inline Format format(__nv_bfloat16) {
    Format format;
    asm("mov.b32 %0, 0xffff;\nmov.b32 %1, 0x7f7f0000;\nmov.b32 %2, 0x0;"
        : "=r"(format.rest), "=f"(format.largest), "=f"(format.normal));
    return format;
}

// `value` rounded to one of its two neighbours in E: away from zero if the low bits of `word` and what is to be cut off carry
// over; src/op/rounding.rs has the same function. From the largest number on it stays, for `store`.
__device__ inline float by_chance(Format format, float value, unsigned word) {
    float size = fabsf(value);
    unsigned bits = __float_as_uint(value);
    if (!(size < format.largest)) return value;
    if (size >= format.normal) return __uint_as_float((bits + (word & format.rest)) & ~format.rest);
    unsigned parts = unsigned(size * 0x1p45f);  // of 2⁻²⁴, 2²¹ each
    float cut = float((parts + (word & 0x1fffff)) >> 21) * 0x1p-24f;
    return __uint_as_float((bits & 0x80000000u) | __float_as_uint(cut));
}

// Elements of 16 bytes, the most that one access moves, as four words.
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
            word(e / 2) = e % 2 == 0 ? half : word(e / 2) | half << 16;  // neighbours are set in their order
        }
    }
};

// 16 bytes of what no thread writes, or zeros where there are none. A predicate and no branch, so that loads overtake each other.
__device__ inline uint4 load_or_zero(const E* from, bool has) {
    uint4 to;
    asm("{.reg .pred has;\nsetp.ne.b32 has, %5, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
        "@has ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];}"
        : "=&r"(to.x), "=&r"(to.y), "=&r"(to.z), "=&r"(to.w) : "l"(from), "r"(int(has)));
    return to;
}

// The same of one element.
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

// The element of row i and column j of a row-major matrix, `stride` elements from one row to the next. 64 bits: a matrix may have
// more elements than an int can count.
__device__ inline size_t at(int i, int j, int stride) { return size_t(i) * stride + j; }

// A factor of an update, read element by element: stored as the weights are, or in f32 beside 16-bit weights.
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

// The element that this thread of a pointwise kernel is for.
__device__ inline size_t element() { return size_t(blockIdx.x) * THREADS + threadIdx.x; }

// Every lane gets the sum of the warp. The order is fixed: the same values give the same bits.
__device__ inline float warp_sum(float value) {
    for (int step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    return value;
}

// What a word decides; it keeps the words of a dropout mask and of roundings with the same seed apart.
constexpr unsigned DROPOUT = 0, ROUNDING = 2;

// The four words that Philox 4x32-10 makes of counter `block` in a stream; random.rs has the same function.
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

// The word of element `index`: four neighbours share a counter.
__device__ inline unsigned word_of(unsigned key0, unsigned key1, size_t index, unsigned stream) {
    uint4 words = philox(key0, key1, index / 4, stream);
    unsigned low = index % 2 ? words.y : words.x, high = index % 2 ? words.w : words.z;
    return index / 2 % 2 ? high : low;
}

// What element `index` is multiplied with: 0 if it is dropped, else keep_scale. No dropout is threshold 0 and keep_scale 1.
struct Dropout {
    unsigned key0, key1, threshold;
    float keep_scale;

    __device__ float factor(size_t index) const {
        if (threshold == 0) return keep_scale;
        return word_of(key0, key1, index, DROPOUT) < threshold ? 0.0f : keep_scale;
    }

    // Four neighbouring 16-bit elements, from a multiple of 4 on, in two words: those that are dropped become 0.
    __device__ void mask(unsigned& low, unsigned& high, size_t index) const {
        uint4 words = philox(key0, key1, index / 4, DROPOUT);
        low &= (words.x < threshold ? 0 : 0xffffu) | (words.y < threshold ? 0 : 0xffff0000u);
        high &= (words.z < threshold ? 0 : 0xffffu) | (words.w < threshold ? 0 : 0xffff0000u);
    }
};
