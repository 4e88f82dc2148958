// out = sum, or out += sum: the epilogue of lora_forward, lora_backward, lora_merge, linear_forward and linear_backward

fn epilogue(i: u32, j: u32, remaining: u32, sums: vec4<f32>) {
  let e = at(s.out, i, j);
  var line = sums;
  if (ADD_TO_OUT) { line += out_read(e, s.out.col, remaining); }
  out_write(e, s.out.col, remaining, rounded_line(line, OUT_HALF));
}
