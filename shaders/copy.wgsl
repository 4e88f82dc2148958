// to = from, in 32-bit words that hold one element, or (PER_WORD = 2) two 16-bit ones. Both may have a row stride.
//
// An invocation owns whole words of `to`, and leaves the half of a word outside the matrix as it is.

struct Copy {
  rows: u32, cols: u32,
  from_: u32, from_row: u32,
  to: u32, to_row: u32,
  first_word: u32, words: u32,
}

@group(0) @binding(0) var<uniform> c: Copy;
@group(0) @binding(1) var<storage, read> from_: array<u32>;
@group(0) @binding(2) var<storage, read_write> to: array<u32>;

// Index in `from_` for element e of `to`, and 1; 0 as the second number if e is outside the matrix.
fn source(e: u32) -> vec2<u32> {
  if (e < c.to) { return vec2(0u, 0u); }
  let place = e - c.to;
  let i = place / c.to_row;
  let j = place % c.to_row;
  return vec2(c.from_ + i * c.from_row + j, u32(i < c.rows && j < c.cols));
}

fn half_of(word: u32, element: u32) -> u32 {
  return (word >> (16u * (element % 2u))) & 0xffffu;
}

@compute @workgroup_size(THREADS)
fn copy(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  for (var w = id.x; w < c.words; w += groups.x * THREADS) {
    let word = c.first_word + w;
    if (PER_WORD == 1u) {
      let at = source(word);
      if (at.y == 1u) { to[word] = from_[at.x]; }
      continue;
    }
    let low = source(2u * word);
    let high = source(2u * word + 1u);
    if (low.y + high.y == 0u) { continue; }
    let held = to[word];
    var halves = vec2(held & 0xffffu, held >> 16u);
    if (low.y == 1u) { halves.x = half_of(from_[low.x / 2u], low.x); }
    if (high.y == 1u) { halves.y = half_of(from_[high.x / 2u], high.x); }
    to[word] = halves.x | (halves.y << 16u);
  }
}
