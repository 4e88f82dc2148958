//! AMX tiles: bf16 products of 16×32 with 32×16, summed in f32.

/// FLOP/s, if this CPU has AMX and the kernel lets us.
pub fn flop_rate(_threads: usize) -> Option<f64> {
    None
}
