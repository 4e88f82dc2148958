#include "common.cuh"

// y += scale·x, in f32
KERNEL(accumulate)(const float* x, float scale, float* y, size_t len) {
    size_t i = element();
    if (i < len) y[i] += scale * x[i];
}
