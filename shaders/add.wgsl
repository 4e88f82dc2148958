// y += scale·x

// `x` and `y` are offsets of the first element in each binding.
struct Add { len: u32, scale: f32, x: u32, y: u32 }

@group(0) @binding(0) var<uniform> a: Add;
@group(0) @binding(1) var<storage, read> x: array<Elem>;
@group(0) @binding(2) var<storage, read_write> y: array<Elem>;

@compute @workgroup_size(THREADS)
fn add(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  for (var e = id.x; e < a.len; e += groups.x * THREADS) {
    let at = a.y + e;
    y[at] = Elem(rounded(fma(a.scale, f32(x[a.x + e]), f32(y[at])), HALF));
  }
}
