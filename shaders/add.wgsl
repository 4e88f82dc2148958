// y += x

@group(0) @binding(0) var<uniform> len: vec4<u32>;
@group(0) @binding(1) var<storage, read> x: array<Elem>;
@group(0) @binding(2) var<storage, read_write> y: array<Elem>;

@compute @workgroup_size(THREADS)
fn add(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  for (var e = id.x; e < len.x; e += groups.x * THREADS) {
    y[e] = Elem(rounded(f32(y[e]) + f32(x[e]), HALF));
  }
}
