alias Elem = f32;
const HALF = false;
alias lhs_elem = f32;
alias lhs_unit = vec4<f32>;
const lhs_K_MAJOR = true;
const lhs_VEC4 = true;
@group(0) @binding(1) var<storage, read> lhs: array<lhs_unit>;
// Reads a factor of a product. This file is included once for each of lhs, rhs, base_lhs and base_rhs, with its name in place of
// lhs.
//
// A factor has a side (the rows of a left side, the columns of a right side) and a depth. It is K_MAJOR if consecutive elements
// are consecutive along the depth. The lines before this file declare lhs, an array of lhs_unit: a binding, or, for a
// missing product, a private variable that is never read.

// Element e, or with VEC4 vector e of four elements.
fn lhs_at(e: u32) -> vec4<f32> {
  return vec4<f32>(vec4<lhs_elem>(lhs[e]));
}

// Four elements that are consecutive in memory, the first at i along the side and p along the depth; 0 outside. There is no
// branch: elements outside are read from an index that exists, and dropped.
fn lhs_line(i: u32, p: u32) -> vec4<f32> {
  let factor = s.lhs;
  let inside = i < factor.len && p < factor.depth;
  let e = factor.offset + select(0u, i * factor.side_stride + p * factor.depth_stride, inside);
  if (lhs_VEC4) { return select(vec4(0.0), lhs_at(e / 4u), inside); }
  let remaining = select(0u, select(factor.len - i, factor.depth - p, lhs_K_MAJOR), inside);
  let last = max(remaining, 1u) - 1u;
  let step = select(factor.side_stride, factor.depth_stride, lhs_K_MAJOR);
  let line = vec4(
    lhs_at(e).x,
    lhs_at(e + min(1u, last) * step).x,
    lhs_at(e + min(2u, last) * step).x,
    lhs_at(e + min(3u, last) * step).x);
  return select(vec4(0.0), line, vec4(0u, 1u, 2u, 3u) < vec4(remaining));
}

alias rhs_elem = f32;
alias rhs_unit = vec4<f32>;
const rhs_K_MAJOR = true;
const rhs_VEC4 = true;
@group(0) @binding(2) var<storage, read> rhs: array<rhs_unit>;
// Reads a factor of a product. This file is included once for each of lhs, rhs, base_lhs and base_rhs, with its name in place of
// rhs.
//
// A factor has a side (the rows of a left side, the columns of a right side) and a depth. It is K_MAJOR if consecutive elements
// are consecutive along the depth. The lines before this file declare rhs, an array of rhs_unit: a binding, or, for a
// missing product, a private variable that is never read.

// Element e, or with VEC4 vector e of four elements.
fn rhs_at(e: u32) -> vec4<f32> {
  return vec4<f32>(vec4<rhs_elem>(rhs[e]));
}

// Four elements that are consecutive in memory, the first at i along the side and p along the depth; 0 outside. There is no
// branch: elements outside are read from an index that exists, and dropped.
fn rhs_line(i: u32, p: u32) -> vec4<f32> {
  let factor = s.rhs;
  let inside = i < factor.len && p < factor.depth;
  let e = factor.offset + select(0u, i * factor.side_stride + p * factor.depth_stride, inside);
  if (rhs_VEC4) { return select(vec4(0.0), rhs_at(e / 4u), inside); }
  let remaining = select(0u, select(factor.len - i, factor.depth - p, rhs_K_MAJOR), inside);
  let last = max(remaining, 1u) - 1u;
  let step = select(factor.side_stride, factor.depth_stride, rhs_K_MAJOR);
  let line = vec4(
    rhs_at(e).x,
    rhs_at(e + min(1u, last) * step).x,
    rhs_at(e + min(2u, last) * step).x,
    rhs_at(e + min(3u, last) * step).x);
  return select(vec4(0.0), line, vec4(0u, 1u, 2u, 3u) < vec4(remaining));
}

alias base_lhs_elem = f32;
alias base_lhs_unit = vec4<f32>;
const base_lhs_K_MAJOR = true;
const base_lhs_VEC4 = true;
@group(0) @binding(3) var<storage, read> base_lhs: array<base_lhs_unit>;
// Reads a factor of a product. This file is included once for each of lhs, rhs, base_lhs and base_rhs, with its name in place of
// base_lhs.
//
// A factor has a side (the rows of a left side, the columns of a right side) and a depth. It is K_MAJOR if consecutive elements
// are consecutive along the depth. The lines before this file declare base_lhs, an array of base_lhs_unit: a binding, or, for a
// missing product, a private variable that is never read.

// Element e, or with VEC4 vector e of four elements.
fn base_lhs_at(e: u32) -> vec4<f32> {
  return vec4<f32>(vec4<base_lhs_elem>(base_lhs[e]));
}

// Four elements that are consecutive in memory, the first at i along the side and p along the depth; 0 outside. There is no
// branch: elements outside are read from an index that exists, and dropped.
fn base_lhs_line(i: u32, p: u32) -> vec4<f32> {
  let factor = s.base_lhs;
  let inside = i < factor.len && p < factor.depth;
  let e = factor.offset + select(0u, i * factor.side_stride + p * factor.depth_stride, inside);
  if (base_lhs_VEC4) { return select(vec4(0.0), base_lhs_at(e / 4u), inside); }
  let remaining = select(0u, select(factor.len - i, factor.depth - p, base_lhs_K_MAJOR), inside);
  let last = max(remaining, 1u) - 1u;
  let step = select(factor.side_stride, factor.depth_stride, base_lhs_K_MAJOR);
  let line = vec4(
    base_lhs_at(e).x,
    base_lhs_at(e + min(1u, last) * step).x,
    base_lhs_at(e + min(2u, last) * step).x,
    base_lhs_at(e + min(3u, last) * step).x);
  return select(vec4(0.0), line, vec4(0u, 1u, 2u, 3u) < vec4(remaining));
}

alias base_rhs_elem = f32;
alias base_rhs_unit = vec4<f32>;
const base_rhs_K_MAJOR = true;
const base_rhs_VEC4 = true;
@group(0) @binding(4) var<storage, read> base_rhs: array<base_rhs_unit>;
// Reads a factor of a product. This file is included once for each of lhs, rhs, base_lhs and base_rhs, with its name in place of
// base_rhs.
//
// A factor has a side (the rows of a left side, the columns of a right side) and a depth. It is K_MAJOR if consecutive elements
// are consecutive along the depth. The lines before this file declare base_rhs, an array of base_rhs_unit: a binding, or, for a
// missing product, a private variable that is never read.

// Element e, or with VEC4 vector e of four elements.
fn base_rhs_at(e: u32) -> vec4<f32> {
  return vec4<f32>(vec4<base_rhs_elem>(base_rhs[e]));
}

// Four elements that are consecutive in memory, the first at i along the side and p along the depth; 0 outside. There is no
// branch: elements outside are read from an index that exists, and dropped.
fn base_rhs_line(i: u32, p: u32) -> vec4<f32> {
  let factor = s.base_rhs;
  let inside = i < factor.len && p < factor.depth;
  let e = factor.offset + select(0u, i * factor.side_stride + p * factor.depth_stride, inside);
  if (base_rhs_VEC4) { return select(vec4(0.0), base_rhs_at(e / 4u), inside); }
  let remaining = select(0u, select(factor.len - i, factor.depth - p, base_rhs_K_MAJOR), inside);
  let last = max(remaining, 1u) - 1u;
  let step = select(factor.side_stride, factor.depth_stride, base_rhs_K_MAJOR);
  let line = vec4(
    base_rhs_at(e).x,
    base_rhs_at(e + min(1u, last) * step).x,
    base_rhs_at(e + min(2u, last) * step).x,
    base_rhs_at(e + min(3u, last) * step).x);
  return select(vec4(0.0), line, vec4(0u, 1u, 2u, 3u) < vec4(remaining));
}

const ROWS = 4u;
const LANES = 8u;
const SLICES = 16u;
const THREADS = 128u;
const REDUCTION_BLOCKS = 64u;
const BY_DEPTH = true;
// A slice's part of a product, for skinny.wgsl. This file is included for lhs·rhs and for base_lhs·base_rhs, with those names in
// place of lhs and rhs.

// Sums of four rows from i on, over four depths from p on. A column of the block is contiguous in memory: depths of one column of
// rhs if that is K_MAJOR, else columns.
fn lhs_rows(i: u32, p: u32, block: mat4x4<f32>) -> mat4x4<f32> {
  var lines: mat4x4<f32>;
  if (lhs_K_MAJOR) {
    lines[0] = lhs_line(i, p);
    if (ROWS > 1u) {
      lines[1] = lhs_line(i + 1u, p);
      lines[2] = lhs_line(i + 2u, p);
      lines[3] = lhs_line(i + 3u, p);
    }
  } else {
    lines = transpose(mat4x4(lhs_line(i, p), lhs_line(i, p + 1u), lhs_line(i, p + 2u), lhs_line(i, p + 3u)));
  }
  var sums: mat4x4<f32>;
  sums[0] = lhs_row(lines[0], block);
  if (ROWS > 1u) {
    sums[1] = lhs_row(lines[1], block);
    sums[2] = lhs_row(lines[2], block);
    sums[3] = lhs_row(lines[3], block);
  }
  return sums;
}

fn lhs_row(line: vec4<f32>, block: mat4x4<f32>) -> vec4<f32> {
  if (rhs_K_MAJOR) { return line * block; }
  return block * line;
}

fn lhs_block(j: u32, p: u32) -> mat4x4<f32> {
  if (rhs_K_MAJOR) { return mat4x4(rhs_line(j, p), rhs_line(j + 1u, p), rhs_line(j + 2u, p), rhs_line(j + 3u, p)); }
  return mat4x4(rhs_line(j, p), rhs_line(j, p + 1u), rhs_line(j, p + 2u), rhs_line(j, p + 3u));
}

fn add_lhs(slice: u32, slices: u32, i: u32, j: u32) {
  for (var p = 4u * slice; p < s.lhs.depth; p += 4u * slices) {
    let block = lhs_block(j, p);
    block0 += lhs_rows(i, p, block);
    if (ROWS > 4u) { block1 += lhs_rows(i + 4u, p, block); }
  }
}

// A slice's part of a product, for skinny.wgsl. This file is included for lhs·rhs and for base_lhs·base_rhs, with those names in
// place of base_lhs and base_rhs.

// Sums of four rows from i on, over four depths from p on. A column of the block is contiguous in memory: depths of one column of
// rhs if that is K_MAJOR, else columns.
fn base_lhs_rows(i: u32, p: u32, block: mat4x4<f32>) -> mat4x4<f32> {
  var lines: mat4x4<f32>;
  if (base_lhs_K_MAJOR) {
    lines[0] = base_lhs_line(i, p);
    if (ROWS > 1u) {
      lines[1] = base_lhs_line(i + 1u, p);
      lines[2] = base_lhs_line(i + 2u, p);
      lines[3] = base_lhs_line(i + 3u, p);
    }
  } else {
    lines = transpose(mat4x4(base_lhs_line(i, p), base_lhs_line(i, p + 1u), base_lhs_line(i, p + 2u), base_lhs_line(i, p + 3u)));
  }
  var sums: mat4x4<f32>;
  sums[0] = base_lhs_row(lines[0], block);
  if (ROWS > 1u) {
    sums[1] = base_lhs_row(lines[1], block);
    sums[2] = base_lhs_row(lines[2], block);
    sums[3] = base_lhs_row(lines[3], block);
  }
  return sums;
}

fn base_lhs_row(line: vec4<f32>, block: mat4x4<f32>) -> vec4<f32> {
  if (base_rhs_K_MAJOR) { return line * block; }
  return block * line;
}

fn base_lhs_block(j: u32, p: u32) -> mat4x4<f32> {
  if (base_rhs_K_MAJOR) { return mat4x4(base_rhs_line(j, p), base_rhs_line(j + 1u, p), base_rhs_line(j + 2u, p), base_rhs_line(j + 3u, p)); }
  return mat4x4(base_rhs_line(j, p), base_rhs_line(j, p + 1u), base_rhs_line(j, p + 2u), base_rhs_line(j, p + 3u));
}

fn add_base_lhs(slice: u32, slices: u32, i: u32, j: u32) {
  for (var p = 4u * slice; p < s.base_lhs.depth; p += 4u * slices) {
    let block = base_lhs_block(j, p);
    block0 += base_lhs_rows(i, p, block);
    if (ROWS > 4u) { block1 += base_lhs_rows(i + 4u, p, block); }
  }
}

const HAS_BASE = true;
const HAS_INIT = true;
alias Init = f32;
alias init_unit = vec4<f32>;
const VEC4 = true;
const init_BINDING = 5;
const OUT_HALF = false;
const ADD_TO_OUT = false;
alias out_elem = f32;
alias out_unit = vec4<f32>;
const out_BINDING = 6;
// Reads and writes an output, four consecutive elements of a row at a time. This file is included once for each output (out, or
// m, v and w), with its name in place of out. VEC4: four elements are accessed at once.

@group(0) @binding(out_BINDING) var<storage, read_write> out: array<out_unit>;

fn out_at(e: u32) -> vec4<f32> { return vec4<f32>(vec4<out_elem>(out[e])); }
fn out_store(e: u32, line: vec4<f32>) { out[e] = vec4<f32>(line); }

// Reads four elements from e on, `step` apart, of which only `remaining` may exist.
fn out_read(e: u32, step: u32, remaining: u32) -> vec4<f32> {
  if (VEC4) { return out_at(e / 4u); }
  var line = vec4(out_at(e).x, 0.0, 0.0, 0.0);
  if (remaining > 1u) { line.y = out_at(e + step).x; }
  if (remaining > 2u) { line.z = out_at(e + 2u * step).x; }
  if (remaining > 3u) { line.w = out_at(e + 3u * step).x; }
  return line;
}

// Writes four elements from e on, `step` apart, of which only `remaining` may exist.
fn out_write(e: u32, step: u32, remaining: u32, line: vec4<f32>) {
  if (VEC4) {
    out_store(e / 4u, line);
    return;
  }
  out_store(e, line);
  if (remaining > 1u) { out_store(e + step, line.yyyy); }
  if (remaining > 2u) { out_store(e + 2u * step, line.zzzz); }
  if (remaining > 3u) { out_store(e + 3u * step, line.wwww); }
}

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

// Adds the blocks of SLICES invocations that divide the depth, LANES invocations apart, in a fixed order.

var<workgroup> folded: array<mat4x4<f32>, REDUCTION_BLOCKS>;

// The sum over a lane's slices, in slice 0, as a tree: the upper half is added to the lower half.
fn reduced_block(part: mat4x4<f32>, slice: u32, lane: u32) -> mat4x4<f32> {
  var block = part;
  for (var half = SLICES / 2u; half > 0u; half /= 2u) {
    if (slice >= half && slice < 2u * half) { folded[(slice - half) * LANES + lane] = block; }
    workgroupBarrier();
    if (slice < half) { block += folded[slice * LANES + lane]; }
    workgroupBarrier();
  }
  return block;
}

// sum = init + scale·lhs·rhs + base_lhs·base_rhs, for few rows
//
// The work is reading the right side, once for every ROWS (1, 4 or 8) rows.
//
//           depth             depth            An invocation owns four columns of ROWS rows, and a part of the depth, four
//        ┌─────────┐        ┌─────────┐        at a time: a vec4 of each row of lhs, a block of 4×4 of rhs. The loop uses no
//        │lhs  ▪▪▪▪│        │rhs  ▪▪▪▪│        workgroup memory and no barrier; at the end the invocations of a column are
//   rows │     ▪▪▪▪│   four │     ▪▪▪▪│        added in a fixed order.
//        │     ▪▪▪▪│   cols │     ▪▪▪▪│
//        └─────────┘        └─────────┘        Consecutive invocations read consecutive elements: if rhs is K_MAJOR they share
//                                              columns and divide the depth, else they share the depth and divide the columns.

// The sums: column r of block0 is row r, column r of block1 is row 4 + r.
var<private> block0: mat4x4<f32>;
var<private> block1: mat4x4<f32>;

// Invocation `slice` of the `slices` that share four columns, which are number `lane` of the workgroup's `lanes`.
fn sum_columns(group: vec2<u32>, lane: u32, lanes: u32, slice: u32, slices: u32) {
  let i = ROWS * group.y;
  let j = 4u * (group.x * lanes + lane);
  add_lhs(slice, slices, i, j);
  block0 *= s.scale;
  block1 *= s.scale;
  if (HAS_BASE) { add_base_lhs(slice, slices, i, j); }
  reduce_blocks(slice, lane);
  if (slice > 0u || j >= s.cols) { return; }
  epilogue_block(i, j, block0);
  if (ROWS > 4u) { epilogue_block(i + 4u, j, block1); }
}

// skinny.wgsl without subgroups: the invocations that share columns add their sums in workgroup memory.

fn reduce_blocks(slice: u32, lane: u32) {
  block0 = reduced_block(block0, slice, lane);
  if (ROWS > 4u) { block1 = reduced_block(block1, slice, lane); }
}

@compute @workgroup_size(THREADS)
fn sum_of_products(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let slice = select(t / LANES, t % SLICES, BY_DEPTH);
  let lane = select(t % LANES, t / SLICES, BY_DEPTH);
  sum_columns(group.xy, lane, LANES, slice, SLICES);
}

// out = sum, or out += sum: the epilogue of lora_forward, lora_backward, lora_merge, linear_forward and linear_backward

fn epilogue(i: u32, j: u32, remaining: u32, sums: vec4<f32>) {
  let e = at(s.out, i, j);
  var line = sums;
  if (ADD_TO_OUT) { line += out_read(e, s.out.col, remaining); }
  out_write(e, s.out.col, remaining, rounded_line(line, OUT_HALF));
}

