// out = sum, or out += sum: how lora_forward, lora_backward, lora_merge, linear_forward and linear_backward finish sums.

fn finish(i: u32, j: u32, left: u32, sums: vec4<f32>) {
  let e = at(s.out, i, j);
  var line = sums;
  if (ADD_TO_OUT) { line += out_read(e, s.out.col, left); }
  out_write(e, s.out.col, left, rounded_line(line, OUT_HALF));
}
