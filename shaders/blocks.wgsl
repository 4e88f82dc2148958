// engine.wgsl, with both products in the invocations' blocks.

fn add_more(t: u32, row: u32, col: u32, slice: u32, r: u32, c: u32, subgroup: u32) {
  for (var depth = 0u; depth < s.more_depth; depth += TILE_DEPTH) {
    more_lhs_fill(t, row, depth);
    more_rhs_fill(t, col, depth);
    workgroupBarrier();
    multiply(slice, r, c);
    workgroupBarrier();
  }
}

@compute @workgroup_size(THREADS)
fn sum_of_products(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  sum_tile(group, t, 0u);
}
