// y = max(x, 0)

@group(0) @binding(0) var<uniform> len: vec4<u32>;
@group(0) @binding(1) var<storage, read> x: array<Elem>;
@group(0) @binding(2) var<storage, read_write> y: array<Elem>;

@compute @workgroup_size(THREADS)
fn relu(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  for (var e = id.x; e < len.x; e += groups.x * THREADS) {
    y[e] = select(x[e], Elem(0.0), x[e] < Elem(0.0)); // a NaN is not below 0, and stays
  }
}
