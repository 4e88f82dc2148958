// loss = mean(-log softmax(logits)[label]),  dlogits = (softmax(logits) - onehot(label)) / counted
//
// The mean is over the `counted` rows with a label; the gradient of the others is 0. A workgroup has one row at a time, and
// writes its loss to a list, which mean.wgsl adds in a fixed order: no atomics.

// `logits` to `dlogits` are offsets of the first element in each binding.
struct CrossEntropy { rows: u32, cols: u32, counted: f32, logits: u32, labels: u32, losses: u32, dlogits: u32 }

// The label of a row without one.
const IGNORED = 0xffffffffu;

@group(0) @binding(0) var<uniform> c: CrossEntropy;
@group(0) @binding(1) var<storage, read> logits: array<Elem>;
@group(0) @binding(2) var<storage, read> labels: array<u32>;
@group(0) @binding(3) var<storage, read_write> losses: array<f32>;
@group(0) @binding(4) var<storage, read_write> dlogits: array<Elem>;

var<workgroup> shared_values: array<f32, THREADS>;

// The maximum, or the sum, over the workgroup, for every invocation.
fn across(t: u32, value: f32, sum: bool) -> f32 {
  shared_values[t] = value;
  workgroupBarrier();
  for (var half = THREADS / 2u; half > 0u; half /= 2u) {
    if (t < half) {
      let other = shared_values[t + half];
      shared_values[t] = select(max(shared_values[t], other), shared_values[t] + other, sum);
    }
    workgroupBarrier();
  }
  let result = shared_values[0];
  workgroupBarrier();
  return result;
}

fn logit(row: u32, j: u32) -> f32 {
  return f32(logits[c.logits + row * c.cols + j]);
}

@compute @workgroup_size(THREADS)
fn cross_entropy(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) t: u32,
) {
  for (var row = group.x; row < c.rows; row += groups.x) {
    var largest = logit(row, 0u);
    for (var j = t; j < c.cols; j += THREADS) { largest = max(largest, logit(row, j)); }
    largest = across(t, largest, false);

    var powers = 0.0;
    for (var j = t; j < c.cols; j += THREADS) { powers += exp(logit(row, j) - largest); }
    powers = across(t, powers, true);

    let label = labels[c.labels + row];
    for (var j = t; j < c.cols; j += THREADS) {
      let softmax = exp(logit(row, j) - largest) / powers;
      let slope = (softmax - select(0.0, 1.0, j == label)) / c.counted;
      dlogits[c.dlogits + row * c.cols + j] = Elem(rounded(select(slope, 0.0, label == IGNORED), HALF));
    }
    if (t == 0u) {
      var loss = 0.0;
      if (label != IGNORED) { loss = log(powers) + largest - logit(row, label); }
      losses[c.losses + row] = loss;
    }
  }
}
