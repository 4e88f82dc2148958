// What every shader shares. The lines written before this file say what `Elem` is: how weights and activations are stored.

// The nearest number that f16 holds, ties to even, if `half`. Drivers are free to round a conversion as they like; this one
// is exact.
fn rounded(value: f32, half: bool) -> f32 {
  if (!half) { return value; }
  let size = abs(value);
  // Below 2⁻¹⁴ the steps of f16 are 2⁻²⁴, which are those of f32 around 0.75.
  if (size < 0.00006103515625) { return (value + 0.75) - 0.75; }
  let bits = bitcast<u32>(value);
  if (size >= 65520.0) { return bitcast<f32>((bits & 0x80000000u) | 0x7f800000u); }
  if (size < 65520.0) { return bitcast<f32>((bits + 0xfffu + ((bits >> 13u) & 1u)) & 0xffffe000u); }
  return value; // NaN
}

fn rounded_line(line: vec4<f32>, half: bool) -> vec4<f32> {
  return vec4(rounded(line.x, half), rounded(line.y, half), rounded(line.z, half), rounded(line.w, half));
}
