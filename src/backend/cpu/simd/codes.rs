//! Values of 4-bit codes: a table of sixteen `f32`, and its bytes in the order in which shuffles of bytes look them up.

/// Sixteen values: byte `i` of code `c`'s value is `planes[i][c]`.
pub(crate) struct CodeTable {
    pub(crate) values: [f32; 16],
    pub(crate) planes: [[u8; 16]; 4],
}

impl CodeTable {
    pub(crate) const fn new(values: [f32; 16]) -> Self {
        let mut planes = [[0; 16]; 4];
        let mut code = 0;
        while code < 16 {
            let bytes = values[code].to_bits().to_le_bytes();
            let mut i = 0;
            while i < 4 {
                planes[i][code] = bytes[i];
                i += 1;
            }
            code += 1;
        }
        Self { values, planes }
    }

    /// The values of 32 codes, two in a byte, the first of them in the upper half.
    #[inline(always)]
    pub(super) fn look_up(&self, codes: &[u8; 16]) -> [[f32; 16]; 2] {
        std::array::from_fn(|v| {
            std::array::from_fn(|i| {
                let two = codes[v * 8 + i / 2];
                self.values[(if i.is_multiple_of(2) { two >> 4 } else { two & 15 }) as usize]
            })
        })
    }
}

/// In which order [`Simd::look_up_apart`](super::Simd::look_up_apart) gives the values of 64 codes: lane `i` of vector `v` is that of code
/// `APART[16·v + i]`. All codes from upper halves come first, and the bytes of the two halves of a load by turns of four.
pub(crate) const APART: [u8; 64] = {
    let mut order = [0; 64];
    let mut at = 0;
    while at < 64 {
        // Of each half: 32 lanes, which are two vectors.
        let (half, lane) = (at / 32, at % 32);
        let (four, within) = (lane / 4, lane % 4);
        let byte = four / 2 * 4 + four % 2 * 16 + within;
        order[at] = (2 * byte + half) as u8;
        at += 1;
    }
    order
};
