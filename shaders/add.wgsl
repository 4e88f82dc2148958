// y += x

// .x is the number of elements; .y and .z are offsets of the first in each binding.
@group(0) @binding(0) var<uniform> len_and_offsets: vec4<u32>;
@group(0) @binding(1) var<storage, read> x: array<Elem>;
@group(0) @binding(2) var<storage, read_write> y: array<Elem>;

@compute @workgroup_size(THREADS)
fn add(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  for (var e = id.x; e < len_and_offsets.x; e += groups.x * THREADS) {
    let at = len_and_offsets.z + e;
    y[at] = Elem(rounded(f32(y[at]) + f32(x[len_and_offsets.y + e]), HALF));
  }
}
