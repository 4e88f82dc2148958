#include "common.cuh"

// y += scale·x
KERNEL(add)(const E* x, float scale, E* y, size_t len) {
    size_t i = element();
    if (i < len) store(&y[i], widen(y[i]) + scale * widen(x[i]));
}
