#include "common.cuh"

// y = max(x, 0); NaN stays NaN.
KERNEL(relu)(const E* x, E* y, size_t len) {
    size_t i = element();
    if (i < len) store(&y[i], widen(x[i]) < 0.0f ? 0.0f : widen(x[i]));
}

// dx = dy where y > 0, else 0
KERNEL(relu_backward)(const E* y, const E* dy, E* dx, size_t len) {
    size_t i = element();
    if (i < len) store(&dx[i], widen(y[i]) > 0.0f ? widen(dy[i]) : 0.0f);
}
