#include "wide.cuh"

// The big products. The plan chooses them where lines start at multiples of 16 bytes; in f32 only if there is a tile for every
// multiprocessor.

// dW = dyᵀ·x
KERNEL(linear_backward_dw_wide)(const E* x, const E* dy, float* dw, int m, int k, int n, int x_stride, int dy_stride) {
    WideTile tile(n, k);
    tile.add(columns(dy, n, m, dy_stride), columns(x, k, m, x_stride));
    tile.each([&](int i, int j, float sum) { dw[at(i, j, k)] = sum; });
}

// y = x·Wᵀ + bias + scale·h·Bᵀ; without W only the update
KERNEL(lora_forward_y_wide)(const E* x, const E* w, const E* bias, const E* b, const float* h, float scale, E* y,
                            int m, int k, int n, int r, int x_stride, int w_stride, int b_stride, int y_stride,
                            unsigned accumulate) {
    wait_for_previous_launch();
    WideTile tile(m, n);
    tile.add_update(rows(h, m, r), rows(b, n, r, b_stride));
    tile.scale(scale);
    if (w) tile.add(rows(x, m, k, x_stride), rows(w, n, k, w_stride));
    tile.each([&](int i, int j, float sum) {
        store_output(&y[at(i, j, y_stride)], sum + (bias ? widen(bias[j]) : 0.0f), accumulate);
    });
}

// dx = dy·W + drop(dh·A); without W only the update
KERNEL(lora_backward_dx_wide)(const E* w, const E* a, const E* dy, const float* dh, unsigned key0, unsigned key1,
                                unsigned threshold, float keep_scale, E* dx, int m, int k, int n, int r,
                                int w_stride, int a_stride, int dy_stride, int dx_stride, unsigned accumulate) {
    wait_for_previous_launch();
    Dropout dropout{key0, key1, threshold, keep_scale};
    WideTile tile(m, k);
    tile.add_update(rows(dh, m, r), columns(a, k, r, a_stride));
    if (threshold > 0) tile.transform([&](int i, int j, float sum) { return sum * dropout.factor(at(i, j, k)); });
    if (w) tile.add(rows(dy, m, n, dy_stride), columns(w, k, n, w_stride));
    tile.each([&](int i, int j, float sum) { store_output(&dx[at(i, j, dx_stride)], sum, accumulate); });
}
