// out[i][p] = scale·Σ_j left[i][j]·right[slot of i][p][j]; 0 beyond the rank of a slot, and in rows that use none
//
// A workgroup makes one sum at a time.

@group(0) @binding(5) var<storage, read_write> out: array<f32>;

var<workgroup> sums: array<f32, THREADS>;

@compute @workgroup_size(THREADS)
fn rows_narrow(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) t: u32,
) {
  for (var e = group.x; e < r.rows * r.room; e += groups.x) {
    let i = e / r.room;
    let p = e % r.room;
    let slot = list[r.list + i];
    var factor = 0.0;
    var sum = 0.0;
    if (slot != NO_SLOT) {
      factor = scale_of(slot);
      if (p < rank_of(slot)) {
        let line = r.right + (slot * r.room + p) * r.right_row;
        for (var j = t; j < r.cols; j += THREADS) {
          sum = fma(f32(left[r.left + i * r.left_row + j]), f32(right[line + j]), sum);
        }
      }
    }
    sums[t] = sum;
    workgroupBarrier();
    for (var half = THREADS / 2u; half > 0u; half /= 2u) {
      if (t < half) { sums[t] += sums[t + half]; }
      workgroupBarrier();
    }
    if (t == 0u) { out[r.out + e] = factor * sums[0]; }
    workgroupBarrier();
  }
}
