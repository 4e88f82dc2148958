// Adam with an f32 master of the weight: starts from the master if `w` is its rounded value, else from `w`, which was written
// since.

fn weight_read(i: u32, j: u32, remaining: u32) -> vec4<f32> {
  let w = w_read(at(s.out, i, j), s.out.col, remaining);
  let master = master_read(at(s.moments, i, j), s.moments.col, remaining);
  // The comparison goes through the element type, as `w` did: a device may flush small f16 to zero.
  let stored = vec4<f32>(vec4<Elem>(rounded_line(master, HALF)));
  return select(w, master, stored == w);
}

fn weight_write(i: u32, j: u32, remaining: u32, line: vec4<f32>) {
  master_write(at(s.moments, i, j), s.moments.col, remaining, line);
  w_write(at(s.out, i, j), s.out.col, remaining, rounded_line(line, HALF));
}
