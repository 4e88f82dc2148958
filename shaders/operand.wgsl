// How a factor of a product is read. This file is written once for each of lhs, rhs, more_lhs and more_rhs, with that name in
// place of OPERAND.
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
