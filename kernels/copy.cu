#include "common.cuh"

// to = from, for matrices of any type, as `len` words, `cols` in a row; strides are in words
template <class Word>
__device__ void copy_words(const Word* from, Word* to, size_t len, size_t cols, size_t from_stride, size_t to_stride) {
    size_t i = element();
    if (i < len) to[i / cols * to_stride + i % cols] = from[i / cols * from_stride + i % cols];
}

// Words of two bytes: the size of every element is a multiple.
KERNEL(copy)(const unsigned short* from, unsigned short* to, size_t len, size_t cols, size_t from_stride, size_t to_stride) {
    copy_words(from, to, len, cols, from_stride, to_stride);
}

// Words of 16 bytes: rows must start, and end, at multiples of that.
KERNEL(copy_wide)(const uint4* from, uint4* to, size_t len, size_t cols, size_t from_stride, size_t to_stride) {
    copy_words(from, to, len, cols, from_stride, to_stride);
}

// to = round(from): an f32 factor in the element type of the weights
KERNEL(round_factor)(const float* from, E* to, size_t len, size_t cols, size_t from_stride) {
    size_t i = element();
    if (i < len) store(&to[i], from[i / cols * from_stride + i % cols]);
}
