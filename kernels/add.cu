#include "common.cuh"

// y += x
KERNEL(add)(const E* x, E* y, size_t len) {
    size_t i = element();
    if (i < len) store(&y[i], widen(y[i]) + widen(x[i]));
}
