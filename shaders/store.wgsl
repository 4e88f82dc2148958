// out = sum, or out += sum: how lora_forward, lora_backward, lora_merge, linear_forward and linear_backward finish a sum.

@group(0) @binding(6) var<storage, read_write> out: array<Out>;

fn finish(i: u32, j: u32, sum: f32) {
  let e = at(s.out, i, j);
  if (ADD_TO_OUT) {
    out[e] = Out(rounded(f32(out[e]) + sum, OUT_HALF));
  } else {
    out[e] = Out(rounded(sum, OUT_HALF));
  }
}
