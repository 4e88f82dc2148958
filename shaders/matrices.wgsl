// engine.wgsl with the base product, of f16 by f16, in cooperative matrices of SIZE×SIZE (tensor cores, if there are any).
//
// The update, whose factors may be f32, is made in the invocations' blocks as usual. Through workgroup memory these sums become
// the initial values of cooperative matrices, which become blocks again at the end. A subgroup owns some consecutive matrices of
// one row; a line that begins with EACH is repeated for each of them, with its number in place of Q.

const HALF_LHS_TILE_VEC4S = LHS_TILE_VEC4S;
const HALF_RHS_TILE_VEC4S = RHS_TILE_VEC4S;
// Lines are padded by two vec4, so that they start at multiples of 16 bytes and in different banks.
const HALF_LHS_TILE_LINE = HALF_LHS_TILE_VEC4S + 2u;
const HALF_RHS_TILE_LINE = HALF_RHS_TILE_VEC4S + 2u;

// Arrays of scalars, from which matrices are loaded.
var<workgroup> half_lhs_tile: array<f16, TILE_DEPTH * 4u * HALF_LHS_TILE_LINE>;
var<workgroup> half_rhs_tile: array<f16, TILE_DEPTH * 4u * HALF_RHS_TILE_LINE>;
var<workgroup> sums: array<f32, TILE_ROWS * TILE_COLS>;

fn half_lhs_put(slot: u32, line: vec4<f32>) {
  half_lhs_tile[4u * slot] = f16(line.x);
  half_lhs_tile[4u * slot + 1u] = f16(line.y);
  half_lhs_tile[4u * slot + 2u] = f16(line.z);
  half_lhs_tile[4u * slot + 3u] = f16(line.w);
}

fn half_rhs_put(slot: u32, line: vec4<f32>) {
  half_rhs_tile[4u * slot] = f16(line.x);
  half_rhs_tile[4u * slot + 1u] = f16(line.y);
  half_rhs_tile[4u * slot + 2u] = f16(line.z);
  half_rhs_tile[4u * slot + 3u] = f16(line.w);
}

fn put_sums(e: u32, line: vec4<f32>) {
  sums[e] = line.x;
  sums[e + 1u] = line.y;
  sums[e + 2u] = line.z;
  sums[e + 3u] = line.w;
}

fn sums_at(e: u32) -> vec4<f32> {
  return vec4(sums[e], sums[e + 1u], sums[e + 2u], sums[e + 3u]);
}

fn add_base(t: u32, row: u32, col: u32, slice: u32, r: u32, c: u32, subgroup: u32) {
  let mine = 4u * (r * TILE_COLS + c);
  put_sums(mine, block00[0]);
  put_sums(mine + TILE_COLS, block00[1]);
  put_sums(mine + 2u * TILE_COLS, block00[2]);
  put_sums(mine + 3u * TILE_COLS, block00[3]);
  workgroupBarrier();

  let first = subgroup * EACHES;
  let i = first / (TILE_COLS / SIZE) * SIZE;
  let j = first % (TILE_COLS / SIZE) * SIZE;
  let corner = i * TILE_COLS + j;
  EACH var sumQ = coopLoadT<coop_matSIZExSIZE<f32, C>>(&sums[corner + Qu * SIZE], TILE_COLS);
  for (var depth = 0u; depth < s.base_depth; depth += TILE_DEPTH) {
    base_lhs_fill(t, row, depth);
    base_rhs_fill(t, col, depth);
    workgroupBarrier();
    for (var p = 0u; p < TILE_DEPTH; p += SIZE) {
      // A line of a tile is one depth: a column of the left side, a row of the right side.
      let left = coopLoad<coop_matSIZExSIZE<f16, A>>(&half_lhs_tile[p * 4u * HALF_LHS_TILE_LINE + i], 4u * HALF_LHS_TILE_LINE);
      let line = p * 4u * HALF_RHS_TILE_LINE + j;
      EACH let rightQ = coopLoadT<coop_matSIZExSIZE<f16, B>>(&half_rhs_tile[line + Qu * SIZE], 4u * HALF_RHS_TILE_LINE);
      EACH sumQ = coopMultiplyAdd(left, rightQ, sumQ);
    }
    workgroupBarrier();
  }
  EACH coopStoreT(sumQ, &sums[corner + Qu * SIZE], TILE_COLS);
  workgroupBarrier();
  block00 = mat4x4(
    sums_at(mine), sums_at(mine + TILE_COLS), sums_at(mine + 2u * TILE_COLS), sums_at(mine + 3u * TILE_COLS));
}

@compute @workgroup_size(THREADS)
fn sum_of_products(
  @builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32, @builtin(subgroup_id) subgroup: u32,
) {
  sum_tile(group, t, subgroup);
}
