#include "common.cuh"

// y = drop(x)
KERNEL(dropout_forward)(const E* x, unsigned key0, unsigned key1, unsigned threshold, float keep_scale, E* y, size_t len) {
    Dropout dropout{key0, key1, threshold, keep_scale};
    size_t i = element();
    if (i < len) store(&y[i], widen(x[i]) * dropout.factor(i));
}
