// How a factor of a product comes into workgroup memory. This file is written once for each of lhs, rhs, more_lhs and
// more_rhs, with that name in place of OPERAND, and with SIDE for the tile it fills: lhs or rhs.
//
// A factor lies along its side (the rows of a left side, the columns of a right one) and along the depth. It is DEEP where
// neighbours in memory are neighbours along the depth.

@group(0) @binding(OPERAND_BINDING) var<storage, read> OPERAND: array<OPERAND_unit>;

// Numbers of which `e` is the first; four of them where QUADS says that they may be read at once.
fn OPERAND_at(e: u32) -> vec4<f32> {
  return vec4<f32>(vec4<OPERAND_elem>(OPERAND[e]));
}

// Four numbers that are neighbours in memory, the first of them i along the side and p along the depth; 0 beyond the end.
fn OPERAND_line(i: u32, p: u32) -> vec4<f32> {
  let place = s.OPERAND;
  if (i >= place.len || p >= place.depth) { return vec4(0.0); }
  let e = place.offset + i * place.along + p * place.down;
  if (OPERAND_QUADS) { return OPERAND_at(e / 4u); }
  let left = select(place.len - i, place.depth - p, OPERAND_DEEP);
  let step = select(place.along, place.down, OPERAND_DEEP);
  var line = vec4(OPERAND_at(e).x, 0.0, 0.0, 0.0);
  if (left > 1u) { line.y = OPERAND_at(e + step).x; }
  if (left > 2u) { line.z = OPERAND_at(e + 2u * step).x; }
  if (left > 3u) { line.w = OPERAND_at(e + 3u * step).x; }
  return line;
}

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
    SIDE_tile[slot] = block[0];
    SIDE_tile[slot + SIDE_TILE_LINE] = block[1];
    SIDE_tile[slot + 2u * SIDE_TILE_LINE] = block[2];
    SIDE_tile[slot + 3u * SIDE_TILE_LINE] = block[3];
  }
}
