// out = sum, or out += sum, rounded to one of its two neighbours by chance: how lora_merge finishes sums if it is asked to.
//
// Element e of the matrix takes lane e % 4 of the block that Philox makes of counter e / 4, in the stream of roundings.

// Away from zero if the low bits of `word` and what is to be cut off carry over; src/op/rounding.rs has the same function.
fn by_chance(value: f32, word: u32) -> f32 {
  let size = abs(value);
  if (size >= 65504.0) { return rounded(value, true); }
  let sign = bitcast<u32>(value) & 0x80000000u;
  // Below 2⁻¹⁴ the numbers are whole multiples of 2⁻²⁴; 2²¹ parts of 2⁻⁴⁵ make one.
  if (size < 0.00006103515625) {
    let parts = u32(size * 35184372088832.0);
    let cut = f32((parts + (word & 0x1fffffu)) >> 21u) * 0.000000059604644775390625;
    return bitcast<f32>(sign | bitcast<u32>(cut));
  }
  return bitcast<f32>((bitcast<u32>(value) + (word & 0x1fffu)) & 0xffffe000u);
}

// The word of an element of the matrix.
fn word(element: u32) -> u32 {
  return philox(s.key, element / 4u, 2u)[element % 4u];
}

// Those of four elements. In quads they are all of one block.
fn four_words(element: u32, step: u32) -> vec4<u32> {
  if (QUADS) { return philox(s.key, element / 4u, 2u); }
  return vec4(word(element), word(element + step), word(element + 2u * step), word(element + 3u * step));
}

fn finish(i: u32, j: u32, left: u32, sums: vec4<f32>) {
  let e = at(s.out, i, j);
  let words = four_words(s.first + e, s.out.col);
  var line = sums;
  if (ADD_TO_OUT) { line += out_read(e, s.out.col, left); }
  let rounded = vec4(
    by_chance(line.x, words.x), by_chance(line.y, words.y), by_chance(line.z, words.z), by_chance(line.w, words.w));
  out_write(e, s.out.col, left, rounded);
}
