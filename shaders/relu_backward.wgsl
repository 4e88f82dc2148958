// dx = dy where y > 0, else 0

// How many elements, and where in each binding the first of them is.
@group(0) @binding(0) var<uniform> places: vec4<u32>;
@group(0) @binding(1) var<storage, read> y: array<Elem>;
@group(0) @binding(2) var<storage, read> dy: array<Elem>;
@group(0) @binding(3) var<storage, read_write> dx: array<Elem>;

@compute @workgroup_size(THREADS)
fn relu_backward(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  for (var e = id.x; e < places.x; e += groups.x * THREADS) {
    dx[places.w + e] = select(Elem(0.0), dy[places.z + e], y[places.y + e] > Elem(0.0));
  }
}
