// The weight of adam.wgsl with a master copy in f32: the master where `w` is what it rounds to, else `w`.

fn weight_read(i: u32, j: u32, left: u32) -> vec4<f32> {
  let w = w_read(at(s.out, i, j), s.out.col, left);
  let master = master_read(at(s.moments, i, j), s.moments.col, left);
  // Through the element type and back, as `w` went: a device may make zeros of small f16 on the way.
  let stored = vec4<f32>(vec4<Elem>(rounded_line(master, HALF)));
  return select(w, master, stored == w);
}

fn weight_write(i: u32, j: u32, left: u32, line: vec4<f32>) {
  master_write(at(s.moments, i, j), s.moments.col, left, line);
  w_write(at(s.out, i, j), s.out.col, left, rounded_line(line, HALF));
}
