#include "engine.cuh"

// The scalars of one step, as op/adam.rs works them out.
struct AdamRate {
    float beta1, beta2, step_size, root_scale, eps;

    // m = β₁·m + (1-β₁)·g, v = β₂·v + (1-β₂)·g², w -= step_size·m / (√v·root_scale + eps)
    __device__ void step(float g, float* m, float* v, E* w) const {
        float first = beta1 * *m + (1.0f - beta1) * g;
        float second = beta2 * *v + (1.0f - beta2) * g * g;
        *m = first;
        *v = second;
        store(w, widen(*w) - step_size * first / (sqrtf(second) * root_scale + eps));
    }
};

// Adam with a stored gradient
KERNEL(adam_dense)(const float* g, float beta1, float beta2, float step_size, float root_scale, float eps,
                   float* m, float* v, E* w, size_t len) {
    AdamRate rate{beta1, beta2, step_size, root_scale, eps};
    size_t i = element();
    if (i < len) rate.step(g[i], &m[i], &v[i], &w[i]);
}

// Adam with g = dyᵀ·x, which is never stored
KERNEL(adam_factored)(const E* x, const E* dy, float beta1, float beta2, float step_size, float root_scale, float eps,
                      float* m, float* v, E* w, int batch, int k, int n) {
    AdamRate rate{beta1, beta2, step_size, root_scale, eps};
    Tile tile(n, k);
    tile.add(columns(dy, n, batch), columns(x, k, batch));
    tile.each([&](int i, int j, float g) { rate.step(g, &m[at(i, j, k)], &v[at(i, j, k)], &w[at(i, j, k)]); });
}
