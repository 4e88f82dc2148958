// How a factor of a product is read. This file is written once for each of lhs, rhs, more_lhs and more_rhs, with that name in
// place of OPERAND.
//
// A factor lies along its side (the rows of a left side, the columns of a right one) and along the depth. It is DEEP where
// neighbours in memory are neighbours along the depth. The line before this file declares OPERAND, an array of OPERAND_unit: a
// binding, or a private variable for a product that there is not, whose code is never reached.

// Numbers of which `e` is the first; four of them where QUADS says that they may be read at once.
fn OPERAND_at(e: u32) -> vec4<f32> {
  return vec4<f32>(vec4<OPERAND_elem>(OPERAND[e]));
}

// Four numbers that are neighbours in memory, the first of them i along the side and p along the depth; 0 beyond the end. There is no
// branch: what lies beyond is read from a place that exists, and left out.
fn OPERAND_line(i: u32, p: u32) -> vec4<f32> {
  let place = s.OPERAND;
  let inside = i < place.len && p < place.depth;
  let e = place.offset + select(0u, i * place.along + p * place.down, inside);
  if (OPERAND_QUADS) { return select(vec4(0.0), OPERAND_at(e / 4u), inside); }
  let left = select(0u, select(place.len - i, place.depth - p, OPERAND_DEEP), inside);
  let last = max(left, 1u) - 1u;
  let step = select(place.along, place.down, OPERAND_DEEP);
  let line = vec4(
    OPERAND_at(e).x,
    OPERAND_at(e + min(1u, last) * step).x,
    OPERAND_at(e + min(2u, last) * step).x,
    OPERAND_at(e + min(3u, last) * step).x);
  return select(vec4(0.0), line, vec4(0u, 1u, 2u, 3u) < vec4(left));
}
