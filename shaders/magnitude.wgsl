// y = (magnitude / norm)·z + bias, column by column; where norm is 0, the factor is 0

struct Magnitude { len: u32, first: u32, cols: u32, has_bias: u32 }

@group(0) @binding(0) var<uniform> m: Magnitude;
@group(0) @binding(1) var<storage, read> z: array<Elem>;
@group(0) @binding(2) var<storage, read> magnitude_: array<Elem>;
@group(0) @binding(3) var<storage, read> norm: array<f32>;
@group(0) @binding(4) var<storage, read> bias: array<Elem>;
@group(0) @binding(5) var<storage, read_write> y: array<Elem>;

@compute @workgroup_size(THREADS)
fn magnitude(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  for (var e = id.x; e < m.len; e += groups.x * THREADS) {
    let j = (m.first + e) % m.cols;
    var factor = 0.0;
    if (norm[j] != 0.0) { factor = f32(magnitude_[j]) / norm[j]; }
    var more = 0.0;
    if (m.has_bias == 1u) { more = f32(bias[j]); }
    y[e] = Elem(rounded(fma(factor, f32(z[e]), more), HALF));
  }
}
