// sum = init + scale·lhs·rhs + more_lhs·more_rhs, for few rows: what counts is to read the right side, once for every ROWS (1, 4
// or 8) of them.
//
//           depth             depth            An invocation owns four columns of ROWS rows, and some of the depth, four at a
//        ┌─────────┐        ┌─────────┐        time: a quad of each row of lhs, a block of 4×4 of rhs. Nothing is kept in
//        │lhs  ▪▪▪▪│        │rhs  ▪▪▪▪│        workgroup memory, and nobody waits: at the end the invocations of a column are added
//   rows │     ▪▪▪▪│   four │     ▪▪▪▪│        up, in a fixed order.
//        │     ▪▪▪▪│   cols │     ▪▪▪▪│
//        └─────────┘        └─────────┘        Neighbours read neighbours: where rhs is DEEP they share columns and divide the
//                                              depth, else they share the depth and divide the columns.

// The sums: column r of block0 holds row r, of block1 row 4 + r.
var<private> block0: mat4x4<f32>;
var<private> block1: mat4x4<f32>;

// `slice` of `slices` invocations that share four columns, the group's `lane`-th four of `lanes`.
fn sum_columns(group: vec2<u32>, lane: u32, lanes: u32, slice: u32, slices: u32) {
  let i = ROWS * group.y;
  let j = 4u * (group.x * lanes + lane);
  add_lhs(slice, slices, i, j);
  block0 *= s.scale;
  block1 *= s.scale;
  if (HAS_MORE) { add_more_lhs(slice, slices, i, j); }
  gather_blocks(slice, lane);
  if (slice > 0u || j >= s.cols) { return; }
  finish_block(i, j, block0);
  if (ROWS > 4u) { finish_block(i + 4u, j, block1); }
}
