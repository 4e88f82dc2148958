#include "common.cuh"

// to = from, for matrices of any type: `len` words, `cols` of them in a row
template <class Word>
__device__ void copy_words(const Word* from, Word* to, size_t len, size_t cols, size_t from_stride, size_t to_stride) {
    size_t i = element();
    if (i < len) to[i / cols * to_stride + i % cols] = from[i / cols * from_stride + i % cols];
}

// Two bytes at a time: any type has as many, or twice as many.
KERNEL(copy)(const unsigned short* from, unsigned short* to, size_t len, size_t cols, size_t from_stride, size_t to_stride) {
    copy_words(from, to, len, cols, from_stride, to_stride);
}

// 16 bytes at a time: rows must start, and end, at multiples of that.
KERNEL(copy_wide)(const uint4* from, uint4* to, size_t len, size_t cols, size_t from_stride, size_t to_stride) {
    copy_words(from, to, len, cols, from_stride, to_stride);
}

// to = from, rounded from f32 to the type that is stored: a factor in f32 as products take it
KERNEL(round_factor)(const float* from, E* to, size_t len, size_t cols, size_t from_stride) {
    size_t i = element();
    if (i < len) store(&to[i], from[i / cols * from_stride + i % cols]);
}
