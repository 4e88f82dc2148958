// Shared by rows_narrow, rows_products and rows_outer: each row of a batch has a right side of its own, the adapter of its slot, or none.
//
// `list` holds, one after another: the slot of each row; where the rows of each segment begin among the sorted rows, and where the last
// ends; the slot of each segment; the sorted rows. `table` holds for each slot its scaling and its rank.

const NO_SLOT = 0xffffffffu;

// `left` to `out` are where in each binding the first element is, `left_row` and `right_row` how far rows lie apart, `room` how many rows
// of the right side a slot has. Products are multiplied with `scale` and the scaling of the slot where `scaled` says so.
struct Rows {
  rows: u32, cols: u32, room: u32, segments: u32,
  scaled: u32, scale: f32, left: u32, left_row: u32,
  right: u32, right_row: u32, list: u32, table: u32,
  bias: u32, has_bias: u32, out: u32, unused: u32,
}

@group(0) @binding(0) var<uniform> r: Rows;
@group(0) @binding(1) var<storage, read> left: array<Left>;
@group(0) @binding(2) var<storage, read> right: array<Right>;
@group(0) @binding(3) var<storage, read> list: array<u32>;
@group(0) @binding(4) var<storage, read> table: array<f32>;

fn rank_of(slot: u32) -> u32 { return u32(table[r.table + 2u * slot + 1u]); }

fn scale_of(slot: u32) -> f32 {
  if (r.scaled == 0u) { return 1.0; }
  return r.scale * table[r.table + 2u * slot];
}
