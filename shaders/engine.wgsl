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
