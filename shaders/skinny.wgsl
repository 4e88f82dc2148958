// sum = init + scale·lhs·rhs + base_lhs·base_rhs, for few rows
//
// The work is reading the right side, once for every ROWS (1, 4 or 8) rows.
//
//           depth             depth            An invocation owns four columns of ROWS rows, and a part of the depth, four
//        ┌─────────┐        ┌─────────┐        at a time: a vec4 of each row of lhs, a block of 4×4 of rhs. The loop uses no
//        │lhs  ▪▪▪▪│        │rhs  ▪▪▪▪│        workgroup memory and no barrier; at the end the invocations of a column are
//   rows │     ▪▪▪▪│   four │     ▪▪▪▪│        added in a fixed order.
//        │     ▪▪▪▪│   cols │     ▪▪▪▪│
//        └─────────┘        └─────────┘        Consecutive invocations read consecutive elements: if rhs is K_MAJOR they share
//                                              columns and divide the depth, else they share the depth and divide the columns.

// The sums: column r of block0 is row r, column r of block1 is row 4 + r.
var<private> block0: mat4x4<f32>;
var<private> block1: mat4x4<f32>;

// Invocation `slice` of the `slices` that share four columns, which are number `lane` of the workgroup's `lanes`.
fn sum_columns(group: vec2<u32>, lane: u32, lanes: u32, slice: u32, slices: u32) {
  let i = ROWS * group.y;
  let j = 4u * (group.x * lanes + lane);
  add_lhs(slice, slices, i, j);
  block0 *= s.scale;
  block1 *= s.scale;
  if (HAS_BASE) { add_base_lhs(slice, slices, i, j); }
  reduce_blocks(slice, lane);
  if (slice > 0u || j >= s.cols) { return; }
  epilogue_block(i, j, block0);
  if (ROWS > 4u) { epilogue_block(i + 4u, j, block1); }
}
