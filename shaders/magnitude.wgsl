// y = (magnitude / norm)·z + bias, by columns; the factor is 0 where norm is 0

// `z` to `y` are offsets of the first element in each binding.
struct Magnitude {
  len: u32, first: u32, cols: u32, has_bias: u32,
  z: u32, magnitude: u32, norm: u32, bias: u32, y: u32,
}

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
    let length = norm[m.norm + j];
    if (length != 0.0) { factor = f32(magnitude_[m.magnitude + j]) / length; }
    var added = 0.0;
    if (m.has_bias == 1u) { added = f32(bias[m.bias + j]); }
    y[m.y + e] = Elem(rounded(fma(factor, f32(z[m.z + e]), added), HALF));
  }
}
