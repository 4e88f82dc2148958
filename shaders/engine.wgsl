// sum = init + scale·lhs·rhs + more_lhs·more_rhs
//
// The low-rank term of a verb is no more than extra depth: the loop walks along the depth of one product, then along that of
// the other, in the same accumulators.
//
//            TILE_COLS                A workgroup owns TILE_ROWS × TILE_COLS sums, and walks along the depth in steps of
//           ┌────┬────┐               TILE_DEPTH, for which both sides lie in workgroup memory. An invocation owns one
//     DEPTH │ rhs│    │               block of 4×4 sums (WIDE: four such blocks).
//           └────┴────┘
//     ┌───┐ ┌────┬────┐               Where a tile has fewer blocks than the workgroup has invocations, SLICES of them
//     │lhs│ │ 4×4│    │ TILE_ROWS     share a block: slice s takes the depths s, s + SLICES, …; at the end the slices
//     ├───┤ ├────┼────┤               are added up, in a fixed order.
//     └───┘ └────┴────┘
//
// What becomes of sums is not said here: `finish(i, j, left, sums)`, of four neighbours in a row of which `left` exist, is that of store.wgsl, store_by_chance.wgsl or adam.wgsl.

// Where a factor lies: the number i along its side and p along the depth is at `offset + i·along + p·down`.
struct Factor { offset: u32, along: u32, down: u32, unused: u32, @align(16) len: u32, depth: u32 }

// Where an output lies: `offset + i·row + j·col`.
struct Place { offset: u32, row: u32, col: u32, unused: u32 }

// The scalars of Adam, which finishes a sum that is a gradient.
struct Rate { beta1: f32, beta2: f32, step_size: f32, root_scale: f32, eps: f32 }

// `first` is the place in its matrix of the element that the output's binding begins with; `key` is that of its roundings.
struct Sum {
  rows: u32, cols: u32, depth: u32, more_depth: u32,
  lhs: Factor, rhs: Factor, more_lhs: Factor, more_rhs: Factor,
  init: Place, out: Place, moments: Place,
  scale: f32, first: u32, key: vec2<u32>,
  @align(16) rate: Rate,
}

@group(0) @binding(0) var<uniform> s: Sum;
@group(0) @binding(5) var<storage, read> init: array<init_unit>;

const LHS_TILE_QUADS = TILE_ROWS / 4u;
const RHS_TILE_QUADS = TILE_COLS / 4u;
const BLOCKS = 1u + u32(WIDE);
const ROW_LANES = LHS_TILE_QUADS / BLOCKS;
const COL_LANES = RHS_TILE_QUADS / BLOCKS;
const LANES = ROW_LANES * COL_LANES;
const THREADS = LANES * SLICES;
// One quad more than a line needs: lines then begin in different banks of memory.
const LHS_TILE_LINE = LHS_TILE_QUADS + 1u;
const RHS_TILE_LINE = RHS_TILE_QUADS + 1u;

var<workgroup> lhs_tile: array<vec4<f32>, TILE_DEPTH * LHS_TILE_LINE>;
var<workgroup> rhs_tile: array<vec4<f32>, TILE_DEPTH * RHS_TILE_LINE>;
var<workgroup> folded: array<mat4x4<f32>, FOLDED>;

// The sums of this invocation: column c of a matrix holds row c of a block.
var<private> block00: mat4x4<f32>;
var<private> block01: mat4x4<f32>;
var<private> block10: mat4x4<f32>;
var<private> block11: mat4x4<f32>;

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

// block + a·bᵀ
fn outer(block: mat4x4<f32>, a: vec4<f32>, b: vec4<f32>) -> mat4x4<f32> {
  return mat4x4(
    fma(vec4(a.x), b, block[0]),
    fma(vec4(a.y), b, block[1]),
    fma(vec4(a.z), b, block[2]),
    fma(vec4(a.w), b, block[3]),
  );
}

// The part of the tile's depth that is this slice's.
fn multiply(slice: u32, r: u32, c: u32) {
  for (var p = slice; p < TILE_DEPTH; p += SLICES) {
    let a = lhs_tile[p * LHS_TILE_LINE + r];
    let b = rhs_tile[p * RHS_TILE_LINE + c];
    block00 = outer(block00, a, b);
    if (WIDE) {
      let below = lhs_tile[p * LHS_TILE_LINE + r + ROW_LANES];
      let right = rhs_tile[p * RHS_TILE_LINE + c + COL_LANES];
      block01 = outer(block01, a, right);
      block10 = outer(block10, below, b);
      block11 = outer(block11, below, right);
    }
  }
}

fn scale_blocks() {
  block00 *= s.scale;
  if (WIDE) {
    block01 *= s.scale;
    block10 *= s.scale;
    block11 *= s.scale;
  }
}

// Adds the slices of each block into slice 0, the upper half to the lower half until one is left.
fn fold(slice: u32, lane: u32) {
  for (var half = SLICES / 2u; half > 0u; half /= 2u) {
    if (slice >= half && slice < 2u * half) { folded[(slice - half) * LANES + lane] = block00; }
    workgroupBarrier();
    if (slice < half) { block00 += folded[slice * LANES + lane]; }
    workgroupBarrier();
  }
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

@compute @workgroup_size(THREADS)
fn sum_of_products(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let slice = t / LANES;
  let lane = t % LANES;
  let r = lane / COL_LANES;
  let c = lane % COL_LANES;
  let row = group.y * TILE_ROWS;
  let col = group.x * TILE_COLS;

  for (var depth = 0u; depth < s.depth; depth += TILE_DEPTH) {
    lhs_fill(t, row, depth);
    rhs_fill(t, col, depth);
    workgroupBarrier();
    multiply(slice, r, c);
    workgroupBarrier();
  }
  scale_blocks();
  if (HAS_MORE) {
    for (var depth = 0u; depth < s.more_depth; depth += TILE_DEPTH) {
      more_lhs_fill(t, row, depth);
      more_rhs_fill(t, col, depth);
      workgroupBarrier();
      multiply(slice, r, c);
      workgroupBarrier();
    }
  }
  fold(slice, lane);
  if (slice > 0u) { return; }

  let i = row + 4u * r;
  let j = col + 4u * c;
  finish_block(i, j, block00);
  if (WIDE) {
    let below = i + 4u * ROW_LANES;
    let right = j + 4u * COL_LANES;
    finish_block(i, right, block01);
    finish_block(below, j, block10);
    finish_block(below, right, block11);
  }
}
