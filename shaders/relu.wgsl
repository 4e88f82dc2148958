// y = max(x, 0)

// How many elements, and where in each binding the first of them is.
@group(0) @binding(0) var<uniform> places: vec4<u32>;
@group(0) @binding(1) var<storage, read> x: array<Elem>;
@group(0) @binding(2) var<storage, read_write> y: array<Elem>;

@compute @workgroup_size(THREADS)
fn relu(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  for (var e = id.x; e < places.x; e += groups.x * THREADS) {
    let value = x[places.y + e];
    y[places.z + e] = select(value, Elem(0.0), value < Elem(0.0)); // a NaN is not below 0, and stays
  }
}
