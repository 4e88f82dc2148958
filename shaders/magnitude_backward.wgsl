// dmagnitude = Σ dy·z / norm over the rows; 0 where norm is 0
//
// A workgroup has LANES columns at a time, whose rows are divided among SLICES invocations: slice s takes the rows s, s + SLICES,
// …; at the end the slices are added in a fixed order. Rows that do not fit a binding come in parts: dmagnitude holds the sum
// until the last.

// `z` to `dmagnitude` are offsets of the first element in each binding.
struct MagnitudeBackward {
  rows: u32, cols: u32, begins: u32, ends: u32,
  z: u32, norm: u32, dy: u32, dmagnitude: u32,
}

@group(0) @binding(0) var<uniform> m: MagnitudeBackward;
@group(0) @binding(1) var<storage, read> z: array<Elem>;
@group(0) @binding(2) var<storage, read> norm: array<f32>;
@group(0) @binding(3) var<storage, read> dy: array<Elem>;
@group(0) @binding(4) var<storage, read_write> dmagnitude: array<f32>;

const LANES = min(32u, THREADS);
const SLICES = THREADS / LANES;

var<workgroup> sums: array<f32, THREADS>;

@compute @workgroup_size(THREADS)
fn magnitude_backward(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) t: u32,
) {
  for (var first = group.x * LANES; first < m.cols; first += groups.x * LANES) {
    let j = first + t % LANES;
    var sum = 0.0;
    if (j < m.cols) {
      for (var i = t / LANES; i < m.rows; i += SLICES) {
        let e = i * m.cols + j;
        sum = fma(f32(dy[m.dy + e]), f32(z[m.z + e]), sum);
      }
    }
    sums[t] = sum;
    workgroupBarrier();
    for (var half = SLICES / 2u; half > 0u; half /= 2u) {
      if (t < half * LANES) { sums[t] += sums[t + half * LANES]; }
      workgroupBarrier();
    }
    if (t < LANES && j < m.cols) {
      var all = sums[t];
      if (m.begins == 0u) { all += dmagnitude[m.dmagnitude + j]; }
      if (m.ends == 1u) {
        let length = norm[m.norm + j];
        if (length == 0.0) { all = 0.0; } else { all /= length; }
      }
      dmagnitude[m.dmagnitude + j] = all;
    }
    workgroupBarrier();
  }
}
