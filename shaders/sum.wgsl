// sum = init + scale·lhs·rhs + more_lhs·more_rhs: what every kernel that makes sums shares. How they are made is said in engine.wgsl
// (tiles) and skinny.wgsl (few rows).
//
// What becomes of sums is not said here: `finish(i, j, left, sums)`, of four neighbours in a row of which `left` exist, is that of
// store.wgsl, store_by_chance.wgsl or adam.wgsl.

// Where a factor lies: the number i along its side and p along the depth is at `offset + i·along + p·down`.
struct Factor { offset: u32, along: u32, down: u32, unused: u32, @align(16) len: u32, depth: u32 }

// Where an output lies: `offset + i·row + j·col`.
struct Place { offset: u32, row: u32, col: u32, unused: u32 }

// The scalars of Adam, which finishes a sum that is a gradient.
struct Rate { beta1: f32, beta2: f32, step_size: f32, root_scale: f32, eps: f32, decay: f32 }

// `first` is the place in its matrix of the element that the output's binding begins with; `key` is that of its roundings.
struct Sum {
  rows: u32, cols: u32, depth: u32, more_depth: u32,
  lhs: Factor, rhs: Factor, more_lhs: Factor, more_rhs: Factor,
  init: Place, out: Place, moments: Place,
  scale: f32, first: u32, key: vec2<u32>,
  @align(16) rate: Rate,
}

@group(0) @binding(0) var<uniform> s: Sum;
@group(0) @binding(init_BINDING) var<storage, read> init: array<init_unit>;

fn at(place: Place, i: u32, j: u32) -> u32 {
  return place.offset + i * place.row + j * place.col;
}

fn init_at(e: u32) -> vec4<f32> {
  return vec4<f32>(vec4<Init>(init[e]));
}

// What four neighbours in a row begin with.
fn init_line(i: u32, j: u32, left: u32) -> vec4<f32> {
  if (!HAS_INIT) { return vec4(0.0); }
  let e = at(s.init, i, j);
  if (QUADS) { return init_at(e / 4u); }
  var line = vec4(init_at(e).x, 0.0, 0.0, 0.0);
  if (left > 1u) { line.y = init_at(e + s.init.col).x; }
  if (left > 2u) { line.z = init_at(e + 2u * s.init.col).x; }
  if (left > 3u) { line.w = init_at(e + 3u * s.init.col).x; }
  return line;
}

fn finish_row(i: u32, j: u32, sums: vec4<f32>) {
  if (i >= s.rows || j >= s.cols) { return; }
  let left = s.cols - j;
  finish(i, j, left, init_line(i, j, left) + sums);
}

fn finish_block(i: u32, j: u32, block: mat4x4<f32>) {
  finish_row(i, j, block[0]);
  finish_row(i + 1u, j, block[1]);
  finish_row(i + 2u, j, block[2]);
  finish_row(i + 3u, j, block[3]);
}
