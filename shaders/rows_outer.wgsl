// out[g·room + p][j] = scale·Σ_i left[i][p]·right[i][j] over the rows i of segment g, in their order; 0 beyond the rank of a slot

@group(0) @binding(5) var<storage, read_write> out: array<f32>;

@compute @workgroup_size(THREADS)
fn rows_outer(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  let starts = r.list + r.rows;
  let slots = starts + r.segments + 1u;
  let order = slots + r.segments;
  for (var e = id.x; e < r.segments * r.room * r.cols; e += groups.x * THREADS) {
    let line = e / r.cols;
    let j = e % r.cols;
    let g = line / r.room;
    let p = line % r.room;
    let slot = list[slots + g];
    var sum = 0.0;
    if (p < rank_of(slot)) {
      for (var at = list[starts + g]; at < list[starts + g + 1u]; at++) {
        let i = list[order + at];
        sum = fma(f32(left[r.left + i * r.left_row + p]), f32(right[r.right + i * r.right_row + j]), sum);
      }
    }
    out[r.out + e] = scale_of(slot) * sum;
  }
}
