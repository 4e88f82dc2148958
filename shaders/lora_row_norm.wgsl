// norm = ‖sums‖ by rows, where sums is a band of rows of W + scale·B·A
//
// A workgroup has one row at a time. A row that does not fit a binding comes in parts: norm holds the sum of squares until the
// last.

// `norm` is the offset of the first row's norm in its binding.
struct RowNorm { rows: u32, cols: u32, norm: u32, begins: u32, ends: u32 }

@group(0) @binding(0) var<uniform> r: RowNorm;
@group(0) @binding(1) var<storage, read> sums: array<f32>;
@group(0) @binding(2) var<storage, read_write> norm: array<f32>;

var<workgroup> squares: array<f32, THREADS>;

@compute @workgroup_size(THREADS)
fn lora_row_norm(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) t: u32,
) {
  for (var row = group.x; row < r.rows; row += groups.x) {
    var square = 0.0;
    for (var j = t; j < r.cols; j += THREADS) {
      let sum = sums[row * r.cols + j];
      square = fma(sum, sum, square);
    }
    squares[t] = square;
    workgroupBarrier();
    for (var half = THREADS / 2u; half > 0u; half /= 2u) {
      if (t < half) { squares[t] += squares[t + half]; }
      workgroupBarrier();
    }
    if (t == 0u) {
      let at = r.norm + row;
      var all = squares[0];
      if (r.begins == 0u) { all += norm[at]; }
      norm[at] = select(all, sqrt(all), r.ends == 1u);
    }
    workgroupBarrier();
  }
}
