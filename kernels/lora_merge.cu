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
