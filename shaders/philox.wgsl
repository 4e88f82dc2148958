// Philox 4×32-10, as in src/random.rs: four random words for a block of a stream, with a key.

// The upper and lower half of a·b.
fn multiply_long(a: u32, b: u32) -> vec2<u32> {
  let low = (a & 0xffffu) * (b & 0xffffu);
  let cross = (a >> 16u) * (b & 0xffffu) + (low >> 16u); // at most (2¹⁶-1)² + 2¹⁶-1: no overflow
  let middle = (a & 0xffffu) * (b >> 16u) + (cross & 0xffffu);
  return vec2((a >> 16u) * (b >> 16u) + (cross >> 16u) + (middle >> 16u), a * b);
}

// The words of counter (block, 0, stream, 0).
fn philox(seed: vec2<u32>, block: u32, stream: u32) -> vec4<u32> {
  var key = seed;
  var c = vec4(block, 0u, stream, 0u);
  for (var round = 0u; round < 10u; round++) {
    let left = multiply_long(c.x, 0xd2511f53u);
    let right = multiply_long(c.z, 0xcd9e8d57u);
    c = vec4(right.x ^ c.y ^ key.x, right.y, left.x ^ c.w ^ key.y, left.y);
    key += vec2(0x9e3779b9u, 0xbb67ae85u);
  }
  return c;
}
