#include "wide.cuh"

// The big products; the plan chooses them where lines start at multiples of 16 bytes, in f32 also only for outputs with a tile
// for every multiprocessor.

// dW = dyᵀ·x
KERNEL(linear_backward_dw_wide)(const E* x, const E* dy, float* dw, int m, int k, int n) {
    WideTile tile(n, k);
    tile.add(columns(dy, n, m), columns(x, k, m));
    tile.each([&](int i, int j, float sum) { dw[at(i, j, k)] = sum; });
}

// y = x·Wᵀ + bias + scale·h·Bᵀ; without W only the update
KERNEL(lora_forward_y_wide)(const E* x, const E* w, const E* bias, const E* b, const float* h, float scale, E* y,
                              int m, int k, int n, int r) {
    wait_for_launch_before();
    WideTile tile(m, n);
    tile.add_update(rows(h, m, r), rows(b, n, r));
    tile.scale(scale);
    if (w) tile.add(rows(x, m, k), rows(w, n, k));
    tile.each([&](int i, int j, float sum) { store(&y[at(i, j, n)], sum + (bias ? widen(bias[j]) : 0.0f)); });
}

// dx = dy·W + drop(dh·A); without W only the update
KERNEL(lora_backward_dx_wide)(const E* w, const E* a, const E* dy, const float* dh, unsigned key0, unsigned key1,
                                unsigned threshold, float keep_scale, E* dx, int m, int k, int n, int r) {
    wait_for_launch_before();
    Dropout dropout{key0, key1, threshold, keep_scale};
    WideTile tile(m, k);
    tile.add_update(rows(dh, m, r), columns(a, k, r));
    if (threshold > 0) tile.change([&](int i, int j, float sum) { return sum * dropout.factor(at(i, j, k)); });
    if (w) tile.add(rows(dy, m, n), columns(w, k, n));
    tile.each([&](int i, int j, float sum) { store(&dx[at(i, j, k)], sum); });
}
