// skinny.wgsl with subgroups: the invocations that share columns are a subgroup, and add their sums by subgroup operations.

fn gathered(block: mat4x4<f32>) -> mat4x4<f32> {
  return mat4x4(subgroupAdd(block[0]), subgroupAdd(block[1]), subgroupAdd(block[2]), subgroupAdd(block[3]));
}

fn reduce_blocks(slice: u32, lane: u32) {
  block0 = gathered(block0);
  if (ROWS > 4u) { block1 = gathered(block1); }
}

@compute @workgroup_size(THREADS)
fn sum_of_products(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(subgroup_id) lane: u32, @builtin(num_subgroups) lanes: u32,
  @builtin(subgroup_invocation_id) slice: u32, @builtin(subgroup_size) slices: u32,
) {
  sum_columns(group.xy, lane, lanes, slice, slices);
}
