// out = sum, or out += sum, rounded to one of its two neighbours by chance: how lora_merge finishes a sum if it is asked to.
//
// Element e of the matrix takes lane e % 4 of the block that Philox makes of counter e / 4, in the stream of roundings.

@group(0) @binding(6) var<storage, read_write> out: array<Out>;

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

fn finish(i: u32, j: u32, sum: f32) {
  let e = at(s.out, i, j);
  let element = s.first + e;
  let words = philox(s.key, element / 4u, 2u);
  let before = select(0.0, f32(out[e]), ADD_TO_OUT);
  out[e] = Out(by_chance(before + sum, words[element % 4u]));
}
