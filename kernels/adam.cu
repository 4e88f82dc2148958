#include "engine.cuh"

// The scalars of a step, as src/op/adam.rs computes them, and what it updates. `master` is null, or the f32 master of the
// weights.
struct Adam {
    float beta1, beta2, step_size, root_scale, eps, decay;
    float *m, *v, *master;
    E* w;

    // m = β₁·m + (1-β₁)·g, v = β₂·v + (1-β₂)·g², w = decay·w - step_size·m / (√v·root_scale + eps)
    __device__ void step(float g, size_t i) const {
        float first = beta1 * m[i] + (1.0f - beta1) * g;
        float second = beta2 * v[i] + (1.0f - beta2) * g * g;
        m[i] = first;
        v[i] = second;
        float next = decay * weight(i) - step_size * first / (sqrtf(second) * root_scale + eps);
        if (master) master[i] = next;
        store(&w[i], next);
    }

    // The master if it still rounds to the weight, else the weight, which was written since.
    __device__ float weight(size_t i) const {
        float stored = widen(w[i]);
        if (!master) return stored;
        E rounded;
        store(&rounded, master[i]);
        return widen(rounded) == stored ? master[i] : stored;
    }
};

// Adam with a dense gradient
KERNEL(adam_dense)(const float* g, float beta1, float beta2, float step_size, float root_scale, float eps, float decay,
                   float* m, float* v, float* master, E* w, size_t len) {
    Adam adam{beta1, beta2, step_size, root_scale, eps, decay, m, v, master, w};
    size_t i = element();
    if (i < len) adam.step(g[i], i);
}

// Adam with a factored gradient, g = dyᵀ·x, which is never stored
KERNEL(adam_factored)(const E* x, const E* dy, float beta1, float beta2, float step_size, float root_scale, float eps,
                      float decay, float* m, float* v, float* master, E* w, int batch, int k, int n) {
    Adam adam{beta1, beta2, step_size, root_scale, eps, decay, m, v, master, w};
    Tile tile(n, k);
    tile.add(columns(dy, n, batch), columns(x, k, batch));
    tile.each([&](int i, int j, float g) { adam.step(g, at(i, j, k)); });
}
