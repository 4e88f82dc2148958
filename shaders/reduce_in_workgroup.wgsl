// skinny.wgsl without subgroups: the invocations that share columns add their sums in workgroup memory.

fn reduce_blocks(slice: u32, lane: u32) {
  block0 = reduced_block(block0, slice, lane);
  if (ROWS > 4u) { block1 = reduced_block(block1, slice, lane); }
}

@compute @workgroup_size(THREADS)
fn sum_of_products(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let slice = select(t / LANES, t % SLICES, BY_DEPTH);
  let lane = select(t % LANES, t / SLICES, BY_DEPTH);
  sum_columns(group.xy, lane, LANES, slice, SLICES);
}
