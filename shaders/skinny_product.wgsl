// A slice's part of a product, for skinny.wgsl. This file is included for lhs·rhs and for base_lhs·base_rhs, with those names in
// place of LHS and RHS.

// Sums of four rows from i on, over four depths from p on. A column of the block is contiguous in memory: depths of one column of
// rhs if that is K_MAJOR, else columns.
fn LHS_rows(i: u32, p: u32, block: mat4x4<f32>) -> mat4x4<f32> {
  var lines: mat4x4<f32>;
  if (LHS_K_MAJOR) {
    lines[0] = LHS_line(i, p);
    if (ROWS > 1u) {
      lines[1] = LHS_line(i + 1u, p);
      lines[2] = LHS_line(i + 2u, p);
      lines[3] = LHS_line(i + 3u, p);
    }
  } else {
    lines = transpose(mat4x4(LHS_line(i, p), LHS_line(i, p + 1u), LHS_line(i, p + 2u), LHS_line(i, p + 3u)));
  }
  var sums: mat4x4<f32>;
  sums[0] = LHS_row(lines[0], block);
  if (ROWS > 1u) {
    sums[1] = LHS_row(lines[1], block);
    sums[2] = LHS_row(lines[2], block);
    sums[3] = LHS_row(lines[3], block);
  }
  return sums;
}

fn LHS_row(line: vec4<f32>, block: mat4x4<f32>) -> vec4<f32> {
  if (RHS_K_MAJOR) { return line * block; }
  return block * line;
}

fn LHS_block(j: u32, p: u32) -> mat4x4<f32> {
  if (RHS_K_MAJOR) { return mat4x4(RHS_line(j, p), RHS_line(j + 1u, p), RHS_line(j + 2u, p), RHS_line(j + 3u, p)); }
  return mat4x4(RHS_line(j, p), RHS_line(j, p + 1u), RHS_line(j, p + 2u), RHS_line(j, p + 3u));
}

fn add_LHS(slice: u32, slices: u32, i: u32, j: u32) {
  for (var p = 4u * slice; p < s.LHS.depth; p += 4u * slices) {
    let block = LHS_block(j, p);
    block0 += LHS_rows(i, p, block);
    if (ROWS > 4u) { block1 += LHS_rows(i + 4u, p, block); }
  }
}
