// The weight of adam.wgsl without a master copy.

fn weight_read(i: u32, j: u32, left: u32) -> vec4<f32> {
  return w_read(at(s.out, i, j), s.out.col, left);
}

fn weight_write(i: u32, j: u32, left: u32, line: vec4<f32>) {
  w_write(at(s.out, i, j), s.out.col, left, rounded_line(line, HALF));
}
