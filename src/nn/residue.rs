//! The elements of a weight that merging and unmerging does not restore, because of rounding.
//!
//! Adding an update to a weight and subtracting it again restores nearly every element, bit for bit. A [`Residue`] stores the
//! others: a fraction that grows with the update, instead of a copy of the weight.

use crate::element::Float;

/// Positions and original values of elements of a matrix. For weights that another library owns; the layers of this crate keep their own.
///
/// ```
/// use lowrank::nn::Residue;
///
/// let original = [1.0f32, 0.1];
/// let mut weight = original.map(|w| (w + 1e7) - 1e7); // an update, added and subtracted again
/// let residue = Residue::between(&original, &weight);
/// residue.restore(&mut weight);
/// assert!(residue.len() == 1 && weight == original);
/// ```
///
/// A position is stored as the gap to the one before it, as a varint with seven bits in each byte: usually one byte.
#[derive(Debug)]
pub struct Residue<E> {
    gaps: Vec<u8>,
    originals: Vec<E>,
}

impl<E: Float> Residue<E> {
    /// The elements of `original` whose bits differ from those of `restored`.
    pub fn between(original: &[E], restored: &[E]) -> Self {
        let mut residue = Self { gaps: Vec::new(), originals: Vec::new() };
        let mut from = 0;
        for (at, (was, is)) in original.iter().zip(restored).enumerate() {
            // Bits, not `==`: 0 and -0 differ, and NaN equals itself.
            if bytemuck::bytes_of(was) != bytemuck::bytes_of(is) {
                residue.push_gap(at - from);
                residue.originals.push(*was);
                from = at + 1;
            }
        }
        residue.gaps.shrink_to_fit();
        residue.originals.shrink_to_fit();
        residue
    }

    /// Writes the stored elements back to their positions.
    pub fn restore(&self, restored: &mut [E]) {
        let (mut gaps, mut at) = (self.gaps.iter(), 0);
        for original in &self.originals {
            let (mut gap, mut shift) = (0, 0);
            for &byte in gaps.by_ref() {
                gap |= usize::from(byte & 0x7f) << shift;
                shift += 7;
                if byte < 0x80 {
                    break;
                }
            }
            at += gap;
            if let Some(element) = restored.get_mut(at) {
                *element = *original;
            }
            at += 1;
        }
    }

    /// The number of stored elements.
    pub fn len(&self) -> usize {
        self.originals.len()
    }

    /// Whether no element is stored.
    pub fn is_empty(&self) -> bool {
        self.originals.is_empty()
    }

    /// The bytes of host memory that it takes.
    pub fn bytes(&self) -> usize {
        self.gaps.capacity() + self.originals.capacity() * size_of::<E>()
    }

    fn push_gap(&mut self, mut gap: usize) {
        while gap >= 0x80 {
            self.gaps.push(gap as u8 | 0x80);
            gap >>= 7;
        }
        self.gaps.push(gap as u8);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_of_every_length_come_back() {
        let mut original = vec![1.0f32; 40_000];
        let restored = original.clone();
        for at in [0, 1, 2, 129, 130, 257, 258, 16_700, 39_999] {
            original[at] = at as f32 + 0.5;
        }
        let residue = Residue::between(&original, &restored);
        assert_eq!((residue.len(), residue.bytes()), (9, 9 * 4 + 7 + 2 * 3));
        let mut got = restored;
        residue.restore(&mut got);
        assert_eq!(got, original);
    }

    #[test]
    fn bits_count_not_values() {
        let (original, mut restored) = ([0.0f32, f32::NAN, 1.0], [-0.0f32, f32::NAN, 1.0]);
        let residue = Residue::between(&original, &restored);
        assert_eq!(residue.len(), 1);
        residue.restore(&mut restored);
        assert!(restored[0].is_sign_positive() && restored[1].is_nan());
    }
}
