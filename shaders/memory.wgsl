// Reads and writes an output, four consecutive elements of a row at a time. This file is included once for each output (out, or
// m, v and w), with its name in place of MEMORY. VEC4: four elements are accessed at once.

@group(0) @binding(MEMORY_BINDING) var<storage, read_write> MEMORY: array<MEMORY_unit>;

fn MEMORY_at(e: u32) -> vec4<f32> { return vec4<f32>(vec4<MEMORY_elem>(MEMORY[e])); }
fn MEMORY_store(e: u32, line: vec4<f32>) { MEMORY[e] = MEMORY_CONVERTED; }

// Reads four elements from e on, `step` apart, of which only `remaining` may exist.
fn MEMORY_read(e: u32, step: u32, remaining: u32) -> vec4<f32> {
  if (VEC4) { return MEMORY_at(e / 4u); }
  var line = vec4(MEMORY_at(e).x, 0.0, 0.0, 0.0);
  if (remaining > 1u) { line.y = MEMORY_at(e + step).x; }
  if (remaining > 2u) { line.z = MEMORY_at(e + 2u * step).x; }
  if (remaining > 3u) { line.w = MEMORY_at(e + 3u * step).x; }
  return line;
}

// Writes four elements from e on, `step` apart, of which only `remaining` may exist.
fn MEMORY_write(e: u32, step: u32, remaining: u32, line: vec4<f32>) {
  if (VEC4) {
    MEMORY_store(e / 4u, line);
    return;
  }
  MEMORY_store(e, line);
  if (remaining > 1u) { MEMORY_store(e + step, line.yyyy); }
  if (remaining > 2u) { MEMORY_store(e + 2u * step, line.zzzz); }
  if (remaining > 3u) { MEMORY_store(e + 3u * step, line.wwww); }
}
