// out[i][j] = bias[j] + Σ_p scale·left[i][p]·right[slot of i][p][j]; the bias alone in rows that use no slot

@group(0) @binding(5) var<storage, read> bias: array<Elem>;
@group(0) @binding(6) var<storage, read_write> out: array<f32>;

@compute @workgroup_size(THREADS)
fn rows_products(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  for (var e = id.x; e < r.rows * r.cols; e += groups.x * THREADS) {
    let i = e / r.cols;
    let j = e % r.cols;
    let slot = list[r.list + i];
    var sum = 0.0;
    if (r.has_bias == 1u) { sum = f32(bias[r.bias + j]); }
    if (slot != NO_SLOT) {
      let scale = scale_of(slot);
      for (var p = 0u; p < rank_of(slot); p++) {
        let number = scale * f32(left[r.left + i * r.left_row + p]);
        sum = fma(number, f32(right[r.right + (slot * r.room + p) * r.right_row + j]), sum);
      }
    }
    out[r.out + e] = sum;
  }
}
