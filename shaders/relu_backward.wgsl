// dx = dy where y > 0, else 0

// .x is the number of elements; .y to .w are offsets of the first in each binding.
@group(0) @binding(0) var<uniform> len_and_offsets: vec4<u32>;
@group(0) @binding(1) var<storage, read> y: array<Elem>;
@group(0) @binding(2) var<storage, read> dy: array<Elem>;
@group(0) @binding(3) var<storage, read_write> dx: array<Elem>;

@compute @workgroup_size(THREADS)
fn relu_backward(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  for (var e = id.x; e < len_and_offsets.x; e += groups.x * THREADS) {
    dx[len_and_offsets.w + e] = select(Elem(0.0), dy[len_and_offsets.z + e], y[len_and_offsets.y + e] > Elem(0.0));
  }
}
