// m = β₁·m + (1-β₁)·g,  v = β₂·v + (1-β₂)·g²,  w -= step_size·m / (√v·root_scale + eps)
//
// The gradient g is the sum that the engine made: dyᵀ·x for a factored gradient, which is stored nowhere; or, with no depth
// at all, what the sum begins with, for a dense one.

@group(0) @binding(6) var<storage, read_write> m: array<f32>;
@group(0) @binding(7) var<storage, read_write> v: array<f32>;
@group(0) @binding(8) var<storage, read_write> w: array<Elem>;

fn finish(i: u32, j: u32, g: f32) {
  let e = at(s.moments, i, j);
  let first = fma(s.rate.beta1, m[e], (1.0 - s.rate.beta1) * g);
  let second = fma(s.rate.beta2, v[e], (1.0 - s.rate.beta2) * (g * g));
  let root = fma(sqrt(second), s.rate.root_scale, s.rate.eps);
  m[e] = first;
  v[e] = second;
  let weight = at(s.out, i, j);
  w[weight] = Elem(rounded(fma(-s.rate.step_size, first / root, f32(w[weight])), HALF));
}
