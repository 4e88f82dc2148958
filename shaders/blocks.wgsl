// engine.wgsl with the base product in the invocations' own blocks.

fn add_base(t: u32, row: u32, col: u32, slice: u32, r: u32, c: u32, subgroup: u32) {
  for (var depth = 0u; depth < s.base_depth; depth += TILE_DEPTH) {
    base_lhs_fill(t, row, depth);
    base_rhs_fill(t, col, depth);
    workgroupBarrier();
    multiply(slice, r, c);
    workgroupBarrier();
  }
}

@compute @workgroup_size(THREADS)
fn sum_of_products(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  sum_tile(group, t, 0u);
}
