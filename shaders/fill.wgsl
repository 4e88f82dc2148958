// How a factor of a product comes into workgroup memory. This file is written once for each factor, with its name in place of
// OPERAND (see operand.wgsl), and with SIDE for the tile it fills: lhs or rhs, half_lhs or
// half_rhs.

// Fills the side's tile with what begins `first` along the side and `depth` along the depth, in blocks of 4×4. Neighbours
// load neighbours, whichever way the matrix lies.
fn OPERAND_fill(t: u32, first: u32, depth: u32) {
  for (var e = t; e < TILE_DEPTH / 4u * SIDE_TILE_QUADS; e += THREADS) {
    let p = select(e / SIDE_TILE_QUADS, e % (TILE_DEPTH / 4u), OPERAND_DEEP);
    let q = select(e % SIDE_TILE_QUADS, e / (TILE_DEPTH / 4u), OPERAND_DEEP);
    let i = first + 4u * q;
    let d = depth + 4u * p;
    var block: mat4x4<f32>;
    if (OPERAND_DEEP) {
      block = transpose(mat4x4(
        OPERAND_line(i, d), OPERAND_line(i + 1u, d), OPERAND_line(i + 2u, d), OPERAND_line(i + 3u, d)));
    } else {
      block = mat4x4(
        OPERAND_line(i, d), OPERAND_line(i, d + 1u), OPERAND_line(i, d + 2u), OPERAND_line(i, d + 3u));
    }
    let slot = 4u * p * SIDE_TILE_LINE + q;
    SIDE_put(slot, block[0]);
    SIDE_put(slot + SIDE_TILE_LINE, block[1]);
    SIDE_put(slot + 2u * SIDE_TILE_LINE, block[2]);
    SIDE_put(slot + 3u * SIDE_TILE_LINE, block[3]);
  }
}
