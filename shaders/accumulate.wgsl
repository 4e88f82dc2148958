// y += scale·x, in f32

// `x` and `y` are offsets of the first element in each binding.
struct Accumulate { len: u32, scale: f32, x: u32, y: u32 }

@group(0) @binding(0) var<uniform> a: Accumulate;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(THREADS)
fn accumulate(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  for (var e = id.x; e < a.len; e += groups.x * THREADS) {
    y[a.y + e] = fma(a.scale, x[a.x + e], y[a.y + e]);
  }
}
