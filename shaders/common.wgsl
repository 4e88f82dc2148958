// Shared by all shaders. The lines before this file define `Elem`, the type of stored weights and activations.

// If `half`, rounds to the nearest number of f16, ties to even. WGSL leaves the rounding of conversions to the driver.
fn rounded(value: f32, half: bool) -> f32 {
  if (!half) { return value; }
  let size = abs(value);
  let bits = bitcast<u32>(value);
  // Below 2⁻¹⁴ f16 has multiples of 2⁻²⁴. In integers, since compilers may reassociate float sums.
  if (size < 0.00006103515625) {
    let cut = min(126u - ((bits >> 23u) & 0xffu), 25u);
    let parts = (bits & 0x7fffffu) | 0x800000u;
    let nearest = (parts + (1u << (cut - 1u)) - 1u + ((parts >> cut) & 1u)) >> cut;
    return bitcast<f32>((bits & 0x80000000u) | bitcast<u32>(f32(nearest) * 0.000000059604644775390625));
  }
  if (size >= 65520.0) { return bitcast<f32>((bits & 0x80000000u) | 0x7f800000u); }
  if (size < 65520.0) { return bitcast<f32>((bits + 0xfffu + ((bits >> 13u) & 1u)) & 0xffffe000u); }
  return value; // NaN
}

fn rounded_line(line: vec4<f32>, half: bool) -> vec4<f32> {
  return vec4(rounded(line.x, half), rounded(line.y, half), rounded(line.z, half), rounded(line.w, half));
}
