// Reads a factor of a product. This file is included once for each of lhs, rhs, base_lhs and base_rhs, with its name in place of
// OPERAND.
//
// A factor has a side (the rows of a left side, the columns of a right side) and a depth. It is K_MAJOR if consecutive elements
// are consecutive along the depth. The lines before this file declare OPERAND, an array of OPERAND_unit: a binding, or, for a
// missing product, a private variable that is never read.

// Element e, or with VEC4 vector e of four elements.
fn OPERAND_at(e: u32) -> vec4<f32> {
  return vec4<f32>(vec4<OPERAND_elem>(OPERAND[e]));
}

// Four elements that are consecutive in memory, the first at i along the side and p along the depth; 0 outside. There is no
// branch: elements outside are read from an index that exists, and dropped.
fn OPERAND_line(i: u32, p: u32) -> vec4<f32> {
  let factor = s.OPERAND;
  let inside = i < factor.len && p < factor.depth;
  let e = factor.offset + select(0u, i * factor.side_stride + p * factor.depth_stride, inside);
  if (OPERAND_VEC4) { return select(vec4(0.0), OPERAND_at(e / 4u), inside); }
  let remaining = select(0u, select(factor.len - i, factor.depth - p, OPERAND_K_MAJOR), inside);
  let last = max(remaining, 1u) - 1u;
  let step = select(factor.side_stride, factor.depth_stride, OPERAND_K_MAJOR);
  let line = vec4(
    OPERAND_at(e).x,
    OPERAND_at(e + min(1u, last) * step).x,
    OPERAND_at(e + min(2u, last) * step).x,
    OPERAND_at(e + min(3u, last) * step).x);
  return select(vec4(0.0), line, vec4(0u, 1u, 2u, 3u) < vec4(remaining));
}
