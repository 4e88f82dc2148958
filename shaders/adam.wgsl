// m = β₁·m + (1-β₁)·g,  v = β₂·v + (1-β₂)·g²,  w = decay·w - step_size·m / (√v·root_scale + eps)
//
// The gradient g is the sum that the engine made: dyᵀ·x for a factored gradient, which is stored nowhere; or, with no depth
// at all, what the sum begins with, for a dense one. Where the weight comes from and goes to: adam_weight.wgsl, adam_master.wgsl.

fn finish(i: u32, j: u32, left: u32, g: vec4<f32>) {
  let e = at(s.moments, i, j);
  let step = s.moments.col;
  let first = fma(vec4(s.rate.beta1), m_read(e, step, left), (1.0 - s.rate.beta1) * g);
  let second = fma(vec4(s.rate.beta2), v_read(e, step, left), (1.0 - s.rate.beta2) * (g * g));
  let root = fma(sqrt(second), vec4(s.rate.root_scale), vec4(s.rate.eps));
  m_write(e, step, left, first);
  v_write(e, step, left, second);
  let before = weight_read(i, j, left);
  weight_write(i, j, left, fma(vec4(-s.rate.step_size), first / root, s.rate.decay * before));
}
