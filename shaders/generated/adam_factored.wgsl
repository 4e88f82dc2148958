alias Elem = f32;
const HALF = false;
alias lhs_elem = f32;
alias lhs_unit = vec4<f32>;
const lhs_K_MAJOR = false;
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
const rhs_K_MAJOR = false;
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
const base_lhs_K_MAJOR = false;
const base_lhs_VEC4 = true;
var<private> base_lhs: array<base_lhs_unit, 1>;
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
const base_rhs_K_MAJOR = false;
const base_rhs_VEC4 = true;
var<private> base_rhs: array<base_rhs_unit, 1>;
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

const TILE_ROWS = 64u;
const TILE_COLS = 64u;
const TILE_DEPTH = 16u;
const SLICES = 1u;
const FOUR_BLOCKS = false;
const REDUCTION_BLOCKS = 1u;
// Loads a factor of a product to workgroup memory. This file is included once for each factor, with its name in place of lhs
// (see operand.wgsl) and the name of its tile in place of lhs: lhs or rhs, half_lhs or half_rhs.

// Fills the tile from `first` along the side and `depth` along the depth, in blocks of 4×4. Consecutive invocations load
// consecutive elements, in either orientation.
fn lhs_fill(t: u32, first: u32, depth: u32) {
  for (var e = t; e < TILE_DEPTH / 4u * LHS_TILE_VEC4S; e += THREADS) {
    let p = select(e / LHS_TILE_VEC4S, e % (TILE_DEPTH / 4u), lhs_K_MAJOR);
    let q = select(e % LHS_TILE_VEC4S, e / (TILE_DEPTH / 4u), lhs_K_MAJOR);
    let i = first + 4u * q;
    let d = depth + 4u * p;
    var block: mat4x4<f32>;
    if (lhs_K_MAJOR) {
      block = transpose(mat4x4(
        lhs_line(i, d), lhs_line(i + 1u, d), lhs_line(i + 2u, d), lhs_line(i + 3u, d)));
    } else {
      block = mat4x4(
        lhs_line(i, d), lhs_line(i, d + 1u), lhs_line(i, d + 2u), lhs_line(i, d + 3u));
    }
    let slot = 4u * p * LHS_TILE_LINE + q;
    lhs_put(slot, block[0]);
    lhs_put(slot + LHS_TILE_LINE, block[1]);
    lhs_put(slot + 2u * LHS_TILE_LINE, block[2]);
    lhs_put(slot + 3u * LHS_TILE_LINE, block[3]);
  }
}

// Loads a factor of a product to workgroup memory. This file is included once for each factor, with its name in place of rhs
// (see operand.wgsl) and the name of its tile in place of rhs: lhs or rhs, half_lhs or half_rhs.

// Fills the tile from `first` along the side and `depth` along the depth, in blocks of 4×4. Consecutive invocations load
// consecutive elements, in either orientation.
fn rhs_fill(t: u32, first: u32, depth: u32) {
  for (var e = t; e < TILE_DEPTH / 4u * RHS_TILE_VEC4S; e += THREADS) {
    let p = select(e / RHS_TILE_VEC4S, e % (TILE_DEPTH / 4u), rhs_K_MAJOR);
    let q = select(e % RHS_TILE_VEC4S, e / (TILE_DEPTH / 4u), rhs_K_MAJOR);
    let i = first + 4u * q;
    let d = depth + 4u * p;
    var block: mat4x4<f32>;
    if (rhs_K_MAJOR) {
      block = transpose(mat4x4(
        rhs_line(i, d), rhs_line(i + 1u, d), rhs_line(i + 2u, d), rhs_line(i + 3u, d)));
    } else {
      block = mat4x4(
        rhs_line(i, d), rhs_line(i, d + 1u), rhs_line(i, d + 2u), rhs_line(i, d + 3u));
    }
    let slot = 4u * p * RHS_TILE_LINE + q;
    rhs_put(slot, block[0]);
    rhs_put(slot + RHS_TILE_LINE, block[1]);
    rhs_put(slot + 2u * RHS_TILE_LINE, block[2]);
    rhs_put(slot + 3u * RHS_TILE_LINE, block[3]);
  }
}

// Loads a factor of a product to workgroup memory. This file is included once for each factor, with its name in place of base_lhs
// (see operand.wgsl) and the name of its tile in place of lhs: lhs or rhs, half_lhs or half_rhs.

// Fills the tile from `first` along the side and `depth` along the depth, in blocks of 4×4. Consecutive invocations load
// consecutive elements, in either orientation.
fn base_lhs_fill(t: u32, first: u32, depth: u32) {
  for (var e = t; e < TILE_DEPTH / 4u * LHS_TILE_VEC4S; e += THREADS) {
    let p = select(e / LHS_TILE_VEC4S, e % (TILE_DEPTH / 4u), base_lhs_K_MAJOR);
    let q = select(e % LHS_TILE_VEC4S, e / (TILE_DEPTH / 4u), base_lhs_K_MAJOR);
    let i = first + 4u * q;
    let d = depth + 4u * p;
    var block: mat4x4<f32>;
    if (base_lhs_K_MAJOR) {
      block = transpose(mat4x4(
        base_lhs_line(i, d), base_lhs_line(i + 1u, d), base_lhs_line(i + 2u, d), base_lhs_line(i + 3u, d)));
    } else {
      block = mat4x4(
        base_lhs_line(i, d), base_lhs_line(i, d + 1u), base_lhs_line(i, d + 2u), base_lhs_line(i, d + 3u));
    }
    let slot = 4u * p * LHS_TILE_LINE + q;
    lhs_put(slot, block[0]);
    lhs_put(slot + LHS_TILE_LINE, block[1]);
    lhs_put(slot + 2u * LHS_TILE_LINE, block[2]);
    lhs_put(slot + 3u * LHS_TILE_LINE, block[3]);
  }
}

// Loads a factor of a product to workgroup memory. This file is included once for each factor, with its name in place of base_rhs
// (see operand.wgsl) and the name of its tile in place of rhs: lhs or rhs, half_lhs or half_rhs.

// Fills the tile from `first` along the side and `depth` along the depth, in blocks of 4×4. Consecutive invocations load
// consecutive elements, in either orientation.
fn base_rhs_fill(t: u32, first: u32, depth: u32) {
  for (var e = t; e < TILE_DEPTH / 4u * RHS_TILE_VEC4S; e += THREADS) {
    let p = select(e / RHS_TILE_VEC4S, e % (TILE_DEPTH / 4u), base_rhs_K_MAJOR);
    let q = select(e % RHS_TILE_VEC4S, e / (TILE_DEPTH / 4u), base_rhs_K_MAJOR);
    let i = first + 4u * q;
    let d = depth + 4u * p;
    var block: mat4x4<f32>;
    if (base_rhs_K_MAJOR) {
      block = transpose(mat4x4(
        base_rhs_line(i, d), base_rhs_line(i + 1u, d), base_rhs_line(i + 2u, d), base_rhs_line(i + 3u, d)));
    } else {
      block = mat4x4(
        base_rhs_line(i, d), base_rhs_line(i, d + 1u), base_rhs_line(i, d + 2u), base_rhs_line(i, d + 3u));
    }
    let slot = 4u * p * RHS_TILE_LINE + q;
    rhs_put(slot, block[0]);
    rhs_put(slot + RHS_TILE_LINE, block[1]);
    rhs_put(slot + 2u * RHS_TILE_LINE, block[2]);
    rhs_put(slot + 3u * RHS_TILE_LINE, block[3]);
  }
}

const HAS_BASE = false;
const HAS_INIT = false;
alias Init = f32;
alias init_unit = vec4<f32>;
const VEC4 = true;
const init_BINDING = 3;
alias m_elem = f32;
alias m_unit = vec4<f32>;
const m_BINDING = 4;
// Reads and writes an output, four consecutive elements of a row at a time. This file is included once for each output (out, or
// m, v and w), with its name in place of m. VEC4: four elements are accessed at once.

@group(0) @binding(m_BINDING) var<storage, read_write> m: array<m_unit>;

fn m_at(e: u32) -> vec4<f32> { return vec4<f32>(vec4<m_elem>(m[e])); }
fn m_store(e: u32, line: vec4<f32>) { m[e] = vec4<f32>(line); }

// Reads four elements from e on, `step` apart, of which only `remaining` may exist.
fn m_read(e: u32, step: u32, remaining: u32) -> vec4<f32> {
  if (VEC4) { return m_at(e / 4u); }
  var line = vec4(m_at(e).x, 0.0, 0.0, 0.0);
  if (remaining > 1u) { line.y = m_at(e + step).x; }
  if (remaining > 2u) { line.z = m_at(e + 2u * step).x; }
  if (remaining > 3u) { line.w = m_at(e + 3u * step).x; }
  return line;
}

// Writes four elements from e on, `step` apart, of which only `remaining` may exist.
fn m_write(e: u32, step: u32, remaining: u32, line: vec4<f32>) {
  if (VEC4) {
    m_store(e / 4u, line);
    return;
  }
  m_store(e, line);
  if (remaining > 1u) { m_store(e + step, line.yyyy); }
  if (remaining > 2u) { m_store(e + 2u * step, line.zzzz); }
  if (remaining > 3u) { m_store(e + 3u * step, line.wwww); }
}

alias v_elem = f32;
alias v_unit = vec4<f32>;
const v_BINDING = 5;
// Reads and writes an output, four consecutive elements of a row at a time. This file is included once for each output (out, or
// m, v and w), with its name in place of v. VEC4: four elements are accessed at once.

@group(0) @binding(v_BINDING) var<storage, read_write> v: array<v_unit>;

fn v_at(e: u32) -> vec4<f32> { return vec4<f32>(vec4<v_elem>(v[e])); }
fn v_store(e: u32, line: vec4<f32>) { v[e] = vec4<f32>(line); }

// Reads four elements from e on, `step` apart, of which only `remaining` may exist.
fn v_read(e: u32, step: u32, remaining: u32) -> vec4<f32> {
  if (VEC4) { return v_at(e / 4u); }
  var line = vec4(v_at(e).x, 0.0, 0.0, 0.0);
  if (remaining > 1u) { line.y = v_at(e + step).x; }
  if (remaining > 2u) { line.z = v_at(e + 2u * step).x; }
  if (remaining > 3u) { line.w = v_at(e + 3u * step).x; }
  return line;
}

// Writes four elements from e on, `step` apart, of which only `remaining` may exist.
fn v_write(e: u32, step: u32, remaining: u32, line: vec4<f32>) {
  if (VEC4) {
    v_store(e / 4u, line);
    return;
  }
  v_store(e, line);
  if (remaining > 1u) { v_store(e + step, line.yyyy); }
  if (remaining > 2u) { v_store(e + 2u * step, line.zzzz); }
  if (remaining > 3u) { v_store(e + 3u * step, line.wwww); }
}

alias w_elem = f32;
alias w_unit = vec4<f32>;
const w_BINDING = 6;
// Reads and writes an output, four consecutive elements of a row at a time. This file is included once for each output (out, or
// m, v and w), with its name in place of w. VEC4: four elements are accessed at once.

@group(0) @binding(w_BINDING) var<storage, read_write> w: array<w_unit>;

fn w_at(e: u32) -> vec4<f32> { return vec4<f32>(vec4<w_elem>(w[e])); }
fn w_store(e: u32, line: vec4<f32>) { w[e] = vec4<f32>(line); }

// Reads four elements from e on, `step` apart, of which only `remaining` may exist.
fn w_read(e: u32, step: u32, remaining: u32) -> vec4<f32> {
  if (VEC4) { return w_at(e / 4u); }
  var line = vec4(w_at(e).x, 0.0, 0.0, 0.0);
  if (remaining > 1u) { line.y = w_at(e + step).x; }
  if (remaining > 2u) { line.z = w_at(e + 2u * step).x; }
  if (remaining > 3u) { line.w = w_at(e + 3u * step).x; }
  return line;
}

// Writes four elements from e on, `step` apart, of which only `remaining` may exist.
fn w_write(e: u32, step: u32, remaining: u32, line: vec4<f32>) {
  if (VEC4) {
    w_store(e / 4u, line);
    return;
  }
  w_store(e, line);
  if (remaining > 1u) { w_store(e + step, line.yyyy); }
  if (remaining > 2u) { w_store(e + 2u * step, line.zzzz); }
  if (remaining > 3u) { w_store(e + 3u * step, line.wwww); }
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

// sum = init + scale·lhs·rhs + base_lhs·base_rhs
//
// The low-rank update is additional depth: the loop runs along the depth of one product, then along that of the other, with the
// same sums.
//
//            TILE_COLS                A workgroup owns TILE_ROWS × TILE_COLS sums. It walks along the depth in steps of
//           ┌────┬────┐               TILE_DEPTH, for which both sides are in workgroup memory. An invocation owns one block of
//     DEPTH │ rhs│    │               4×4 sums (FOUR_BLOCKS: four blocks).
//           └────┴────┘
//     ┌───┐ ┌────┬────┐               If a tile has fewer blocks than the workgroup has invocations, SLICES of them share a
//     │lhs│ │ 4×4│    │ TILE_ROWS     block: slice s takes the depths s, s + SLICES, …; at the end the slices are added in a
//     ├───┤ ├────┼────┤               fixed order.
//     └───┘ └────┴────┘

const LHS_TILE_VEC4S = TILE_ROWS / 4u;
const RHS_TILE_VEC4S = TILE_COLS / 4u;
const BLOCKS = 1u + u32(FOUR_BLOCKS);
const ROW_LANES = LHS_TILE_VEC4S / BLOCKS;
const COL_LANES = RHS_TILE_VEC4S / BLOCKS;
const LANES = ROW_LANES * COL_LANES;
const THREADS = LANES * SLICES;
// Lines are padded by one vec4, so that they start in different banks.
const LHS_TILE_LINE = LHS_TILE_VEC4S + 1u;
const RHS_TILE_LINE = RHS_TILE_VEC4S + 1u;

var<workgroup> lhs_tile: array<vec4<f32>, TILE_DEPTH * LHS_TILE_LINE>;
var<workgroup> rhs_tile: array<vec4<f32>, TILE_DEPTH * RHS_TILE_LINE>;

fn lhs_put(slot: u32, line: vec4<f32>) { lhs_tile[slot] = line; }
fn rhs_put(slot: u32, line: vec4<f32>) { rhs_tile[slot] = line; }

// The sums of this invocation: column c of each matrix is row c of a block.
var<private> block00: mat4x4<f32>;
var<private> block01: mat4x4<f32>;
var<private> block10: mat4x4<f32>;
var<private> block11: mat4x4<f32>;

// block + a·bᵀ
fn outer(block: mat4x4<f32>, a: vec4<f32>, b: vec4<f32>) -> mat4x4<f32> {
  return mat4x4(
    fma(vec4(a.x), b, block[0]),
    fma(vec4(a.y), b, block[1]),
    fma(vec4(a.z), b, block[2]),
    fma(vec4(a.w), b, block[3]),
  );
}

// Adds this slice's depths of the tile to the sums.
fn multiply(slice: u32, r: u32, c: u32) {
  for (var p = slice; p < TILE_DEPTH; p += SLICES) {
    let a = lhs_tile[p * LHS_TILE_LINE + r];
    let b = rhs_tile[p * RHS_TILE_LINE + c];
    block00 = outer(block00, a, b);
    if (FOUR_BLOCKS) {
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
  if (FOUR_BLOCKS) {
    block01 *= s.scale;
    block10 *= s.scale;
    block11 *= s.scale;
  }
}

// Computes a tile, in invocation t of subgroup `subgroup`. `add_base` is in blocks.wgsl or matrices.wgsl.
fn sum_tile(group: vec3<u32>, t: u32, subgroup: u32) {
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
  if (HAS_BASE) { add_base(t, row, col, slice, r, c, subgroup); }
  block00 = reduced_block(block00, slice, lane);
  if (slice > 0u) { return; }

  let i = row + 4u * r;
  let j = col + 4u * c;
  epilogue_block(i, j, block00);
  if (FOUR_BLOCKS) {
    let below = i + 4u * ROW_LANES;
    let right = j + 4u * COL_LANES;
    epilogue_block(i, right, block01);
    epilogue_block(below, j, block10);
    epilogue_block(below, right, block11);
  }
}

// engine.wgsl with the base product in the invocations' own blocks.

fn add_base(t: u32, row: u32, col: u32, slice: u32, r: u32, c: u32, subgroup: u32) {
  for (var depth = 0u; depth < s.base_depth; depth += TILE_DEPTH) {
    base_lhs_fill(t, row, depth);
    base_rhs_fill(t, col, depth);
    workgroupBarrier();
    multiply(slice, r, c);
    workgroupBarrier();
  }
}

@compute @workgroup_size(THREADS)
fn sum_of_products(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  sum_tile(group, t, 0u);
}

// Adam without a master of the weight.

fn weight_read(i: u32, j: u32, remaining: u32) -> vec4<f32> {
  return w_read(at(s.out, i, j), s.out.col, remaining);
}

fn weight_write(i: u32, j: u32, remaining: u32, line: vec4<f32>) {
  w_write(at(s.out, i, j), s.out.col, remaining, rounded_line(line, HALF));
}

// m = β₁·m + (1-β₁)·g,  v = β₂·v + (1-β₂)·g²,  w = decay·w - step_size·m / (√v·root_scale + eps)
//
// The gradient g is the sum: dyᵀ·x for a factored gradient, which is never stored; the initial matrix, with depth 0, for a dense
// one. weight_read and weight_write are in adam_weight.wgsl, or in adam_master.wgsl.

fn epilogue(i: u32, j: u32, remaining: u32, g: vec4<f32>) {
  let e = at(s.moments, i, j);
  let step = s.moments.col;
  let first = fma(vec4(s.rate.beta1), m_read(e, step, remaining), (1.0 - s.rate.beta1) * g);
  let second = fma(vec4(s.rate.beta2), v_read(e, step, remaining), (1.0 - s.rate.beta2) * (g * g));
  let root = fma(sqrt(second), vec4(s.rate.root_scale), vec4(s.rate.eps));
  m_write(e, step, remaining, first);
  v_write(e, step, remaining, second);
  let before = weight_read(i, j, remaining);
  weight_write(i, j, remaining, fma(vec4(-s.rate.step_size), first / root, s.rate.decay * before));
}

