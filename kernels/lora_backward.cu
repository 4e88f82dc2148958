#include "engine.cuh"

// dh = scale·dy·B
KERNEL(lora_backward_dh)(const E* b, const E* dy, float scale, float* dh, int m, int n, int r) {
    Tile tile(m, r);
    tile.add(rows(dy, m, n), columns(b, r, n));
    tile.each([&](int i, int j, float sum) { dh[at(i, j, r)] = scale * sum; });
}

// dA = dhᵀ·drop(x)
KERNEL(lora_backward_da)(const E* x, const float* dh, unsigned key0, unsigned key1, unsigned threshold, float keep_scale,
                         float* da, int m, int k, int r) {
    Tile tile(r, k);
    tile.add(columns(dh, r, m), drop(columns(x, k, m), {key0, key1, threshold, keep_scale}));
    tile.each([&](int i, int j, float sum) { da[at(i, j, k)] = sum; });
}

// dB = scale·dyᵀ·h
KERNEL(lora_backward_db)(const float* h, const E* dy, float scale, float* db, int m, int n, int r) {
    Tile tile(n, r);
    tile.add(columns(dy, n, m), columns(h, r, m));
    tile.each([&](int i, int j, float sum) { db[at(i, j, r)] = scale * sum; });
}

// dx = dy·W + drop(dh·A); the mask multiplies the first product, before the second joins its sums. Without W only the update.
KERNEL(lora_backward_dx)(const E* w, const E* a, const E* dy, const float* dh, unsigned key0, unsigned key1,
                         unsigned threshold, float keep_scale, E* dx, int m, int k, int n, int r) {
    Dropout dropout{key0, key1, threshold, keep_scale};
    Tile tile(m, k);
    tile.add(rows(dh, m, r), columns(a, k, r));
    tile.each([&](int i, int j, float& sum) { sum *= dropout.factor(at(i, j, k)); });
    if (w) tile.add(rows(dy, m, n), columns(w, k, n));
    tile.each([&](int i, int j, float sum) { store(&dx[at(i, j, k)], sum); });
}
