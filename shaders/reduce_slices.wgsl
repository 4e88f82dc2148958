// Adds the blocks of SLICES invocations that divide the depth, LANES invocations apart, in a fixed order.

var<workgroup> folded: array<mat4x4<f32>, REDUCTION_BLOCKS>;

// The sum over a lane's slices, in slice 0, as a tree: the upper half is added to the lower half.
fn reduced_block(part: mat4x4<f32>, slice: u32, lane: u32) -> mat4x4<f32> {
  var block = part;
  for (var half = SLICES / 2u; half > 0u; half /= 2u) {
    if (slice >= half && slice < 2u * half) { folded[(slice - half) * LANES + lane] = block; }
    workgroupBarrier();
    if (slice < half) { block += folded[slice * LANES + lane]; }
    workgroupBarrier();
  }
  return block;
}
