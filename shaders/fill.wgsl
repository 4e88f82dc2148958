// Loads a factor of a product to workgroup memory. This file is included once for each factor, with its name in place of OPERAND
// (see operand.wgsl) and the name of its tile in place of SIDE: lhs or rhs, half_lhs or half_rhs.

// Fills the tile from `first` along the side and `depth` along the depth, in blocks of 4×4. Consecutive invocations load
// consecutive elements, in either orientation.
fn OPERAND_fill(t: u32, first: u32, depth: u32) {
  for (var e = t; e < TILE_DEPTH / 4u * SIDE_TILE_VEC4S; e += THREADS) {
    let p = select(e / SIDE_TILE_VEC4S, e % (TILE_DEPTH / 4u), OPERAND_K_MAJOR);
    let q = select(e % SIDE_TILE_VEC4S, e / (TILE_DEPTH / 4u), OPERAND_K_MAJOR);
    let i = first + 4u * q;
    let d = depth + 4u * p;
    var block: mat4x4<f32>;
    if (OPERAND_K_MAJOR) {
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
