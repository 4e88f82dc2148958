// out = alpha·lhs·rhs, or out += alpha·lhs·rhs: a thread an output, and no tile anywhere. The first shader that anyone writes.

struct Product { rows: u32, cols: u32, depth: u32, add: u32, lhs: vec2<u32>, rhs: vec2<u32>, alpha: f32 }

@group(0) @binding(0) var<uniform> p: Product;
@group(0) @binding(1) var<storage, read> lhs: array<Elem>;
@group(0) @binding(2) var<storage, read> rhs: array<Elem>;
@group(0) @binding(3) var<storage, read_write> out: array<Elem>;

@compute @workgroup_size(16, 16)
fn product(@builtin(global_invocation_id) id: vec3<u32>) {
  let i = id.y;
  let j = id.x;
  if (i >= p.rows || j >= p.cols) { return; }
  var sum = 0.0;
  for (var d = 0u; d < p.depth; d++) {
    sum += f32(lhs[i * p.lhs.x + d * p.lhs.y]) * f32(rhs[d * p.rhs.x + j * p.rhs.y]);
  }
  sum *= p.alpha;
  if (p.add != 0u) { sum += f32(out[i * p.cols + j]); }
  out[i * p.cols + j] = Elem(sum);
}
