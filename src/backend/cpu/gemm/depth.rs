//! The cut of the depth of a sum into blocks.

use std::ops::Range;

use super::Product;
use super::micro::Micro;
use super::plan::SHORT_DEPTH;

/// The depth of a sum of one or two terms, end to end, and its blocks: each term is cut into equal blocks of at most
/// `M::DEPTH`; a second term of at most [`SHORT_DEPTH`] joins the last block of the first.
#[derive(Clone, Copy, Debug)]
pub(super) struct Depth {
    terms: [usize; 2],
    /// Blocks start and end at multiples of this within a term.
    step: usize,
    /// The most depth of a block.
    most: usize,
}

impl Depth {
    /// The depth of two terms, each rounded up to a multiple of `M::STEP`.
    pub(super) fn new<M: Micro>(first: usize, second: usize) -> Self {
        let terms = [first, second].map(|depth| depth.next_multiple_of(M::STEP));
        Self { terms, step: M::STEP, most: M::DEPTH }
    }

    /// The depth of these terms.
    pub(super) fn of<E, M: Micro>(terms: &[Product<'_, E>]) -> Self {
        debug_assert!(terms.len() <= 2);
        let depth = |i: usize| terms.get(i).map_or(0, Product::depth);
        Self::new::<M>(depth(0), depth(1))
    }

    /// The depth of both terms.
    pub(super) fn total(self) -> usize {
        self.terms[0] + self.terms[1]
    }

    /// The start of the second term.
    pub(super) fn second(self) -> usize {
        self.terms[0]
    }

    /// The block that starts at `start`, which must be 0 or the end of another block.
    #[inline]
    pub(super) fn block(self, start: usize) -> Range<usize> {
        let [first, second] = self.terms;
        let (begin, depth) = if start < first { (0, first) } else { (first, second) };
        let step = depth.div_ceil(depth.div_ceil(self.most).max(1)).max(1).next_multiple_of(self.step);
        let end = (start + step - (start - begin) % step).min(begin + depth);
        let joins = end == first && second <= SHORT_DEPTH;
        start..if joins { self.total() } else { end }
    }

    /// All blocks, in order.
    pub(super) fn blocks(self) -> impl Iterator<Item = Range<usize>> {
        let next = move |block: &Range<usize>| Some(self.block(block.end)).filter(|block| !block.is_empty());
        std::iter::successors(Some(self.block(0)).filter(|block| !block.is_empty()), next)
    }

    /// The length of the longest block.
    pub(super) fn longest(self) -> usize {
        self.blocks().map(|block| block.len()).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::super::bf16_pairs::Pairs;
    use super::super::micro::Fma;
    use super::*;
    use proptest::prelude::*;

    fn cuts<M: Micro>(k: usize, r: usize) -> Vec<usize> {
        let depth = Depth::new::<M>(k, r);
        assert!(depth.blocks().all(|block| block.len() <= depth.longest() && block.len() <= M::DEPTH + SHORT_DEPTH));
        std::iter::once(0).chain(depth.blocks().map(|block| block.end)).collect()
    }

    #[test]
    fn short_terms_join_the_block_before_them() {
        assert_eq!(cuts::<Fma>(1100, 0), [0, 367, 734, 1100]);
        assert_eq!(cuts::<Fma>(1100, 16), [0, 367, 734, 1116]);
        assert_eq!(cuts::<Fma>(16, 1100), [0, 16, 383, 750, 1116]);
        assert_eq!(cuts::<Fma>(1100, 129), [0, 367, 734, 1100, 1229]);
        assert_eq!(cuts::<Fma>(0, 7), [0, 7]);
        assert_eq!(cuts::<Fma>(0, 0), [0]);
        assert_eq!(cuts::<Pairs>(1100, 48), [0, 576, 1120 + 64]);
    }

    proptest! {
        /// The sum over `W` has the same order with an update and without.
        #[test]
        fn a_second_term_does_not_move_the_cuts_of_the_first(k in 1usize..4000, r in 0usize..1200) {
            let f32s = (cuts::<Fma>(k, 0), cuts::<Fma>(k, r), 1);
            for (base, both, step) in [f32s, (cuts::<Pairs>(k, 0), cuts::<Pairs>(k, r), 32)] {
                prop_assert_eq!(&base[..base.len() - 1], &both[..base.len() - 1]);
                prop_assert!(both.windows(2).all(|cut| cut[0] < cut[1]) && both.iter().all(|cut| cut.is_multiple_of(step)));
                prop_assert_eq!(both[both.len() - 1], k.next_multiple_of(step) + r.next_multiple_of(step));
            }
        }
    }
}
