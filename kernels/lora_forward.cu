#include "engine.cuh"

// h = drop(x)·Aᵀ
KERNEL(lora_forward_h)(const E* x, const E* a, unsigned key0, unsigned key1, unsigned threshold, float keep_scale, float* h,
                       int m, int k, int r) {
    Tile tile(m, r);
    tile.add(drop(rows(x, m, k), {key0, key1, threshold, keep_scale}), rows(a, r, k));
    tile.each([&](int i, int j, float sum) { h[at(i, j, r)] = sum; });
}

// y = x·Wᵀ + bias + scale·h·Bᵀ; without W only the update
KERNEL(lora_forward_y)(const E* x, const E* w, const E* bias, const E* b, const float* h, float scale, E* y,
                       int m, int k, int n, int r) {
    Tile tile(m, n);
    tile.add(rows(h, m, r), rows(b, n, r));
    tile.scale(scale);
    if (w) tile.add(rows(x, m, k), rows(w, n, k));
    tile.each([&](int i, int j, float sum) { store(&y[at(i, j, n)], sum + (bias ? widen(bias[j]) : 0.0f)); });
}
