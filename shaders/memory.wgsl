// How sums come from and go to an output, four neighbours of a row at a time. This file is written once for each output (out, or
// m, v and w), with that name in place of MEMORY. QUADS says that every four may be read and written at once.

@group(0) @binding(MEMORY_BINDING) var<storage, read_write> MEMORY: array<MEMORY_unit>;

fn MEMORY_at(e: u32) -> vec4<f32> { return vec4<f32>(vec4<MEMORY_elem>(MEMORY[e])); }
fn MEMORY_put(e: u32, line: vec4<f32>) { MEMORY[e] = MEMORY_NARROWED; }

// Four numbers from element e on, `step` apart, of which only `left` may exist.
fn MEMORY_read(e: u32, step: u32, left: u32) -> vec4<f32> {
  if (QUADS) { return MEMORY_at(e / 4u); }
  var line = vec4(MEMORY_at(e).x, 0.0, 0.0, 0.0);
  if (left > 1u) { line.y = MEMORY_at(e + step).x; }
  if (left > 2u) { line.z = MEMORY_at(e + 2u * step).x; }
  if (left > 3u) { line.w = MEMORY_at(e + 3u * step).x; }
  return line;
}

// The same, the other way.
fn MEMORY_write(e: u32, step: u32, left: u32, line: vec4<f32>) {
  if (QUADS) {
    MEMORY_put(e / 4u, line);
    return;
  }
  MEMORY_put(e, line);
  if (left > 1u) { MEMORY_put(e + step, line.yyyy); }
  if (left > 2u) { MEMORY_put(e + 2u * step, line.zzzz); }
  if (left > 3u) { MEMORY_put(e + 3u * step, line.wwww); }
}
