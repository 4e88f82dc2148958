// y = drop(x): y[e] = x[e] / (1 - p) if e is not dropped, else 0
//
// Element e of the matrix uses word e % 4 of Philox block e / 4.

// `x` and `y` are offsets of the first element in each binding.
struct Dropout { len: u32, first_block: u32, key: vec2<u32>, threshold: u32, keep_scale: f32, x: u32, y: u32 }

@group(0) @binding(0) var<uniform> d: Dropout;
@group(0) @binding(1) var<storage, read> x: array<From>;
@group(0) @binding(2) var<storage, read_write> y: array<To>;

fn drop(e: u32, number: u32) {
  if (e >= d.len) { return; }
  y[d.y + e] = To(rounded(f32(x[d.x + e]) * select(d.keep_scale, 0.0, number < d.threshold), TO_HALF));
}

@compute @workgroup_size(THREADS)
fn dropout(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  for (var block = id.x; 4u * block < d.len; block += groups.x * THREADS) {
    let numbers = philox(d.key, d.first_block + block, 0u);
    drop(4u * block, numbers.x);
    drop(4u * block + 1u, numbers.y);
    drop(4u * block + 2u, numbers.z);
    drop(4u * block + 3u, numbers.w);
  }
}
