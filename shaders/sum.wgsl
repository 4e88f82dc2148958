// sum = init + scale·lhs·rhs + base_lhs·base_rhs: shared by the kernels of sums. The sums are made in engine.wgsl (tiles) or
// skinny.wgsl (few rows).
//
// The epilogue is in store.wgsl, store_stochastic.wgsl or adam.wgsl: `epilogue(i, j, remaining, sums)`, for four consecutive sums
// of a row, of which `remaining` exist.

// Layout of a factor: element i along its side and p along the depth is at `offset + i·side_stride + p·depth_stride`.
struct Factor { offset: u32, side_stride: u32, depth_stride: u32, unused: u32, @align(16) len: u32, depth: u32 }

// Layout of an output: `offset + i·row + j·col`.
struct Layout { offset: u32, row: u32, col: u32, unused: u32 }

// The scalars of Adam, the epilogue of a gradient.
struct Rate { beta1: f32, beta2: f32, step_size: f32, root_scale: f32, eps: f32, decay: f32 }

// `first` is the index in its matrix of the first element of the output's binding; `key` is the key of stochastic rounding.
struct Sum {
  rows: u32, cols: u32, depth: u32, base_depth: u32,
  lhs: Factor, rhs: Factor, base_lhs: Factor, base_rhs: Factor,
  init: Layout, out: Layout, moments: Layout,
  scale: f32, first: u32, key: vec2<u32>,
  @align(16) rate: Rate,
}

@group(0) @binding(0) var<uniform> s: Sum;
@group(0) @binding(init_BINDING) var<storage, read> init: array<init_unit>;

fn at(matrix: Layout, i: u32, j: u32) -> u32 {
  return matrix.offset + i * matrix.row + j * matrix.col;
}

fn init_at(e: u32) -> vec4<f32> {
  return vec4<f32>(vec4<Init>(init[e]));
}

// The initial values of four consecutive sums of a row.
fn init_line(i: u32, j: u32, remaining: u32) -> vec4<f32> {
  if (!HAS_INIT) { return vec4(0.0); }
  let e = at(s.init, i, j);
  if (VEC4) { return init_at(e / 4u); }
  var line = vec4(init_at(e).x, 0.0, 0.0, 0.0);
  if (remaining > 1u) { line.y = init_at(e + s.init.col).x; }
  if (remaining > 2u) { line.z = init_at(e + 2u * s.init.col).x; }
  if (remaining > 3u) { line.w = init_at(e + 3u * s.init.col).x; }
  return line;
}

fn epilogue_row(i: u32, j: u32, sums: vec4<f32>) {
  if (i >= s.rows || j >= s.cols) { return; }
  let remaining = s.cols - j;
  epilogue(i, j, remaining, init_line(i, j, remaining) + sums);
}

fn epilogue_block(i: u32, j: u32, block: mat4x4<f32>) {
  epilogue_row(i, j, block[0]);
  epilogue_row(i + 1u, j, block[1]);
  epilogue_row(i + 2u, j, block[2]);
  epilogue_row(i + 3u, j, block[3]);
}
