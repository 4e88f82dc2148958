// loss = Σ losses / counted, in a fixed order; 0 if counted is 0

// .x is the number of losses, .y is `counted`, .z and .w are offsets in each binding.
@group(0) @binding(0) var<uniform> m: vec4<u32>;
@group(0) @binding(1) var<storage, read> losses: array<f32>;
@group(0) @binding(2) var<storage, read_write> loss: array<f32>;

var<workgroup> sums: array<f32, THREADS>;

@compute @workgroup_size(THREADS)
fn mean(@builtin(local_invocation_index) t: u32) {
  sums[t] = 0.0;
  for (var i = t; i < m.x; i += THREADS) { sums[t] += losses[m.z + i]; }
  workgroupBarrier();
  for (var half = THREADS / 2u; half > 0u; half /= 2u) {
    if (t < half) { sums[t] += sums[t + half]; }
    workgroupBarrier();
  }
  if (t == 0u) { loss[m.w] = sums[0] / max(1.0, f32(m.y)); }
}
