//! Philox 4×32-10, a counter-based random number generator: a random word is a function of a key and a counter, so any part of
//! a stream can be recomputed, in any order, on any device.
//!
//! J. K. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

/// Returns four random words for a key and a counter. A pure function: it gives the same words on every backend.
pub fn philox(key: [u32; 2], counter: [u32; 4]) -> [u32; 4] {
    let [mut k0, mut k1] = key;
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    for _ in 0..10 {
        let left = u64::from(c0) * 0xD251_1F53;
        let right = u64::from(c2) * 0xCD9E_8D57;
        (c0, c1, c2, c3) = ((right >> 32) as u32 ^ c1 ^ k0, right as u32, (left >> 32) as u32 ^ c3 ^ k1, left as u32);
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    [c0, c1, c2, c3]
}

/// A stream of random numbers from [`philox`], for initial weights and shuffles. A seed gives the same stream on every machine.
#[derive(Clone, Debug)]
pub struct Rng {
    key: [u32; 2],
    block: u64,
    words: [u32; 4],
    used: usize,
}

impl Rng {
    /// The stream with this seed.
    pub fn new(seed: u64) -> Self {
        Self { key: [seed as u32, (seed >> 32) as u32], block: 0, words: [0; 4], used: 4 }
    }

    /// The stream with this seed after [`position`](Self::position) words: goes on where another one stopped.
    pub fn at(seed: u64, position: u64) -> Self {
        let mut rng = Self { block: position / 4, ..Self::new(seed) };
        for _ in 0..position % 4 {
            rng.word();
        }
        rng
    }

    /// The seed of the stream.
    pub fn seed(&self) -> u64 {
        u64::from(self.key[0]) | (u64::from(self.key[1]) << 32)
    }

    /// The number of words that were drawn.
    pub fn position(&self) -> u64 {
        4 * self.block - (4 - self.used as u64)
    }

    /// 32 random bits.
    pub fn word(&mut self) -> u32 {
        if self.used == 4 {
            // With 1 as the third word, the numbers differ from those of a dropout mask with the same seed.
            self.words = philox(self.key, [self.block as u32, (self.block >> 32) as u32, 1, 0]);
            self.block += 1;
            self.used = 0;
        }
        self.used += 1;
        self.words[self.used - 1]
    }

    /// Uniform in `[0, 1)`, with 53 random bits.
    pub fn unit(&mut self) -> f64 {
        let bits = ((u64::from(self.word()) << 32) | u64::from(self.word())) >> 11;
        bits as f64 / (1u64 << 53) as f64
    }

    /// Uniform in `[low, high)`.
    pub fn uniform(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.unit()
    }

    /// Gaussian with mean 0 and standard deviation 1 (Box and Muller).
    pub fn gaussian(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.unit()).cos()
    }

    /// Uniform in `0..n`; 0 if `n` is 0. The bias of the multiplication is below `n / 2³²`.
    pub fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.word()) * n as u128) >> 32) as usize
    }

    /// Puts the items into a random order (Fisher and Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers published with the generator (Random123, kat_vectors).
    #[test]
    fn philox_gives_the_published_numbers() {
        assert_eq!(philox([0, 0], [0; 4]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 2], [u32::MAX; 4]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let (key, counter) = ([0xa409_3822, 0x299f_31d0], [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344]);
        assert_eq!(philox(key, counter), [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    #[test]
    fn streams_have_the_moments_they_promise() {
        let (mut rng, n) = (Rng::new(7), 100_000);
        let sample: Vec<f64> = (0..n).map(|_| rng.gaussian()).collect();
        let mean = sample.iter().sum::<f64>() / n as f64;
        let variance = sample.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n as f64;
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.02, "{mean} {variance}");
        assert!((0..n).all(|_| rng.below(3) < 3 && (0.0..1.0).contains(&rng.unit())));
    }

    #[test]
    fn a_stream_goes_on_from_its_seed_and_position() {
        for drawn in 0..11 {
            let mut rng = Rng::new(0x0123_4567_89ab_cdef);
            for _ in 0..drawn {
                rng.word();
            }
            assert_eq!((rng.seed(), rng.position()), (0x0123_4567_89ab_cdef, drawn));
            let mut again = Rng::at(rng.seed(), rng.position());
            assert_eq!(again.position(), drawn);
            assert!((0..9).all(|_| rng.word() == again.word()), "after {drawn} words");
        }
    }

    #[test]
    fn a_shuffle_keeps_every_item() {
        let mut items: Vec<usize> = (0..1000).collect();
        Rng::new(1).shuffle(&mut items);
        assert!(items.iter().enumerate().any(|(i, &item)| i != item));
        items.sort_unstable();
        assert!(items.into_iter().eq(0..1000));
    }
}
