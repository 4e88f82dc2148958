// m = β₁·m + (1-β₁)·g,  v = β₂·v + (1-β₂)·g²,  w = decay·w - step_size·m / (√v·root_scale + eps)
//
// The gradient g is the sum: dyᵀ·x for a factored gradient, which is never stored; the initial matrix, with depth 0, for a dense
// one. weight_read and weight_write are in adam_weight.wgsl, or in adam_master.wgsl.

fn epilogue(i: u32, j: u32, remaining: u32, g: vec4<f32>) {
  let e = at(s.moments, i, j);
  let step = s.moments.col;
  let first = fma(vec4(s.rate.beta1), m_read(e, step, remaining), (1.0 - s.rate.beta1) * g);
  let second = fma(vec4(s.rate.beta2), v_read(e, step, remaining), (1.0 - s.rate.beta2) * (g * g));
  let root = fma(sqrt(second), vec4(s.rate.root_scale), vec4(s.rate.eps));
  m_write(e, step, remaining, first);
  v_write(e, step, remaining, second);
  let before = weight_read(i, j, remaining);
  weight_write(i, j, remaining, fma(vec4(-s.rate.step_size), first / root, s.rate.decay * before));
}
