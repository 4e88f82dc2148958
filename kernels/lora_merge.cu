#include "engine.cuh"

// W += scale·B·A, in place: each element of W is read and written by one thread, and rounded once.
KERNEL(lora_merge)(const E* a, const E* b, float scale, E* w, int n, int k, int r) {
    Tile tile(n, k);
    tile.add(rows(b, n, r), columns(a, k, r));
    tile.each([&](int i, int j, float sum) {
        E* place = &w[at(i, j, k)];
        store(place, widen(*place) + scale * sum);
    });
}

#ifdef TENSOR  // for 16-bit elements: f32 has nothing to round

// The same, rounded by chance.
KERNEL(lora_merge_by_chance)(const E* a, const E* b, float scale, unsigned key0, unsigned key1, E* w, int n, int k, int r) {
    Tile tile(n, k);
    tile.add(rows(b, n, r), columns(a, k, r));
    tile.each([&](int i, int j, float sum) {
        size_t e = at(i, j, k);
        store(&w[e], by_chance(E(), widen(w[e]) + scale * sum, philox(key0, key1, e / 4, int(e % 4), ROUNDING)));
    });
}

#endif
