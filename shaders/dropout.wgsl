// y = drop(x): y[e] = x[e] / (1 - p) where the generator says keep, else 0
//
// Element e of the matrix takes lane e % 4 of the block that Philox makes of counter e / 4.

struct Dropout { len: u32, first_block: u32, key: vec2<u32>, threshold: u32, keep_scale: f32 }

@group(0) @binding(0) var<uniform> d: Dropout;
@group(0) @binding(1) var<storage, read> x: array<From>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

// The upper and the lower half of a·b.
fn multiply_long(a: u32, b: u32) -> vec2<u32> {
  let low = (a & 0xffffu) * (b & 0xffffu);
  let cross = (a >> 16u) * (b & 0xffffu) + (low >> 16u); // at most (2¹⁶-1)² + 2¹⁶-1: no overflow
  let middle = (a & 0xffffu) * (b >> 16u) + (cross & 0xffffu);
  return vec2((a >> 16u) * (b >> 16u) + (cross >> 16u) + (middle >> 16u), a * b);
}

// Philox 4×32-10 of the counter (block, 0, 0, 0).
fn philox(block: u32) -> vec4<u32> {
  var key = d.key;
  var c = vec4(block, 0u, 0u, 0u);
  for (var round = 0u; round < 10u; round++) {
    let left = multiply_long(c.x, 0xd2511f53u);
    let right = multiply_long(c.z, 0xcd9e8d57u);
    c = vec4(right.x ^ c.y ^ key.x, right.y, left.x ^ c.w ^ key.y, left.y);
    key += vec2(0x9e3779b9u, 0xbb67ae85u);
  }
  return c;
}

fn drop(e: u32, number: u32) {
  if (e >= d.len) { return; }
  y[e] = f32(x[e]) * select(d.keep_scale, 0.0, number < d.threshold);
}

@compute @workgroup_size(THREADS)
fn dropout(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  for (var block = id.x; 4u * block < d.len; block += groups.x * THREADS) {
    let numbers = philox(d.first_block + block);
    drop(4u * block, numbers.x);
    drop(4u * block + 1u, numbers.y);
    drop(4u * block + 2u, numbers.z);
    drop(4u * block + 3u, numbers.w);
  }
}
