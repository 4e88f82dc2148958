//! Reading and copying arrays that no cache holds, in huge pages where the system gives them.

use std::hint::black_box;
use std::sync::Mutex;

use super::best_rate;

/// Bytes of each of two arrays.
const BYTES: usize = 256 << 20;
const TRIES: usize = 15;
const HUGE_PAGE: usize = 2 << 20;

/// Bytes read a second; bytes read and written a second.
pub fn rates(threads: usize) -> [f64; 2] {
    let (mut from, mut to) = (Huge::new(), Huge::new());
    let part = BYTES / 4 / threads / 64 * 64; // floats of a thread, whole blocks
    let read = best_rate(TRIES, threads, |thread| {
        black_box(sum(&from.floats()[thread * part..][..part]));
        4.0 * part as f64
    });
    // Each thread locks its own parts: `best_rate` calls from several threads, and writing needs exclusive access.
    let parts: Vec<Mutex<(&mut [f32], &mut [f32])>> =
        from.floats_mut().chunks_mut(part).zip(to.floats_mut().chunks_mut(part)).map(Mutex::new).collect();
    let with = |thread: usize, write: fn(&mut [f32], &mut [f32])| {
        let mut arrays = parts[thread].lock().expect("another try failed");
        let (from, to) = &mut *arrays;
        write(from, to);
        8.0 * part as f64
    };
    let copy = best_rate(TRIES, threads, |thread| with(thread, |from, to| to.copy_from_slice(from)));
    let in_place = best_rate(TRIES, threads, |thread| with(thread, |_, to| add(to)));
    [read, copy.max(in_place)]
}

/// The sum, in as many chains as keep the loads flowing.
fn sum(floats: &[f32]) -> f32 {
    #[inline(always)]
    fn chains(floats: &[f32]) -> f32 {
        let mut sums = [0.0f32; 128];
        for block in floats.as_chunks::<128>().0 {
            for (sum, x) in sums.iter_mut().zip(block) {
                *sum += x;
            }
        }
        sums.iter().sum()
    }
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        #[target_feature(enable = "avx512f")]
        fn wide(floats: &[f32]) -> f32 {
            chains(floats)
        }
        #[allow(unsafe_code, reason = "a function compiled for AVX-512")]
        // SAFETY: the CPU has it.
        return unsafe { wide(floats) };
    }
    chains(floats)
}

/// Changes every number where it is.
fn add(floats: &mut [f32]) {
    let term = black_box(1.0);
    floats.iter_mut().for_each(|x| *x += term);
}

/// Zeros in huge pages: with small ones the processor spends its time in page tables.
struct Huge(Vec<f32>);

impl Huge {
    fn new() -> Self {
        let mut memory = Vec::<f32>::with_capacity((BYTES + HUGE_PAGE) / 4);
        #[cfg(target_os = "linux")]
        {
            let start = memory.as_mut_ptr().map_addr(|address| address.next_multiple_of(HUGE_PAGE));
            #[allow(unsafe_code, reason = "advice to the kernel")]
            // SAFETY: the range lies within the vector's memory, and the advice does not change its contents. A kernel that does not
            // follow it costs time alone, so its answer is not looked at.
            unsafe {
                libc::madvise(start.cast(), BYTES, libc::MADV_HUGEPAGE);
            }
        }
        memory.resize((BYTES + HUGE_PAGE) / 4, 0.0); // touches the pages
        Self(memory)
    }

    /// From the first huge page on.
    fn start(&self) -> usize {
        let address = self.0.as_ptr().addr();
        (address.next_multiple_of(HUGE_PAGE) - address) / 4
    }

    fn floats(&self) -> &[f32] {
        &self.0[self.start()..][..BYTES / 4]
    }

    fn floats_mut(&mut self) -> &mut [f32] {
        let start = self.start();
        &mut self.0[start..][..BYTES / 4]
    }
}
