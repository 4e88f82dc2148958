// sum = init + scale·lhs·rhs + more_lhs·more_rhs, for up to sixteen rows: what counts is to read the right side once.
//
//           depth             depth            An invocation owns four columns of all the rows, and some of the depth, four at a
//        ┌─────────┐        ┌─────────┐        time: a quad of each row of lhs, a block of 4×4 of rhs. Nothing is kept in
//        │lhs  ▪▪▪▪│        │rhs  ▪▪▪▪│        workgroup memory, and nobody waits: at the end the invocations of a column are added
//   rows │     ▪▪▪▪│   four │     ▪▪▪▪│        up, in a fixed order.
//        │     ▪▪▪▪│   cols │     ▪▪▪▪│
//        └─────────┘        └─────────┘        Neighbours read neighbours: where rhs is DEEP they share columns and divide the
//                                              depth, else they share the depth and divide the columns.

// The sums: column r of block q holds row 4·q + r.
var<private> block0: mat4x4<f32>;
var<private> block1: mat4x4<f32>;
var<private> block2: mat4x4<f32>;
var<private> block3: mat4x4<f32>;

fn scale_blocks() {
  block0 *= s.scale;
  if (ROWS > 4u) { block1 *= s.scale; }
  if (ROWS > 8u) { block2 *= s.scale; }
  if (ROWS > 12u) { block3 *= s.scale; }
}

fn finish_blocks(j: u32) {
  finish_block(0u, j, block0);
  if (ROWS > 4u) { finish_block(4u, j, block1); }
  if (ROWS > 8u) { finish_block(8u, j, block2); }
  if (ROWS > 12u) { finish_block(12u, j, block3); }
}

// `slice` of `slices` invocations that share four columns, the group's `lane`-th four of `lanes`.
fn sum_columns(group: u32, lane: u32, lanes: u32, slice: u32, slices: u32) {
  let j = 4u * (group * lanes + lane);
  add_lhs(slice, slices, j);
  scale_blocks();
  if (HAS_MORE) { add_more_lhs(slice, slices, j); }
  gather_blocks(slice, lane);
  if (slice == 0u && j < s.cols) { finish_blocks(j); }
}
