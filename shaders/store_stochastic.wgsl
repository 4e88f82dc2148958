// out = sum, or out += sum, rounded stochastically: the epilogue of lora_merge with `Rounding::Stochastic`
//
// Element e of the matrix uses word e % 4 of Philox block e / 4, in the stream for rounding.

// Rounds to one of the two neighbours in f16: away from zero if the bits to be cut plus random bits of `word` carry. The same
// function as in src/op/rounding.rs.
fn stochastic_round(value: f32, word: u32) -> f32 {
  let size = abs(value);
  if (size >= 65504.0) { return rounded(value, true); }
  let sign = bitcast<u32>(value) & 0x80000000u;
  // Below 2⁻¹⁴ f16 has multiples of 2⁻²⁴, each of 2²¹ units of 2⁻⁴⁵.
  if (size < 0.00006103515625) {
    let parts = u32(size * 35184372088832.0);
    let cut = f32((parts + (word & 0x1fffffu)) >> 21u) * 0.000000059604644775390625;
    return bitcast<f32>(sign | bitcast<u32>(cut));
  }
  return bitcast<f32>((bitcast<u32>(value) + (word & 0x1fffu)) & 0xffffe000u);
}

// The random word of an element.
fn word(element: u32) -> u32 {
  return philox(s.key, element / 4u, 2u)[element % 4u];
}

// The random words of four elements; with VEC4 they are one Philox block.
fn four_words(element: u32, step: u32) -> vec4<u32> {
  if (VEC4) { return philox(s.key, element / 4u, 2u); }
  return vec4(word(element), word(element + step), word(element + 2u * step), word(element + 3u * step));
}

fn epilogue(i: u32, j: u32, remaining: u32, sums: vec4<f32>) {
  let e = at(s.out, i, j);
  let words = four_words(s.first + e, s.out.col);
  var line = sums;
  if (ADD_TO_OUT) { line += out_read(e, s.out.col, remaining); }
  let rounded = vec4(
    stochastic_round(line.x, words.x), stochastic_round(line.y, words.y),
    stochastic_round(line.z, words.z), stochastic_round(line.w, words.w));
  out_write(e, s.out.col, remaining, rounded);
}
