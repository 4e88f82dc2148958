// Adam without a master of the weight.

fn weight_read(i: u32, j: u32, remaining: u32) -> vec4<f32> {
  return w_read(at(s.out, i, j), s.out.col, remaining);
}

fn weight_write(i: u32, j: u32, remaining: u32, line: vec4<f32>) {
  w_write(at(s.out, i, j), s.out.col, remaining, rounded_line(line, HALF));
}
