//! How the depth of a sum is cut into blocks.

use std::ops::Range;

use super::Product;
use super::micro::Micro;
use super::plan::SHORT;

/// How deep the terms of a sum are, laid end to end, and how that depth is cut into blocks: each term into equal ones of at
/// most `M::DEPTH`, but a short term joins the block before it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Depth {
    terms: [usize; 2],
    /// Steps that are not parted.
    step: usize,
    /// Steps of a block.
    most: usize,
}

impl Depth {
    /// Of terms that are so deep, each filled up to whole steps of the micro-kernel.
    pub(super) fn new<M: Micro>(first: usize, second: usize) -> Self {
        let terms = [first, second].map(|depth| depth.next_multiple_of(M::STEP));
        Self { terms, step: M::STEP, most: M::DEPTH }
    }

    pub(super) fn of<E, M: Micro>(terms: &[Product<'_, E>]) -> Self {
        debug_assert!(terms.len() <= 2);
        let depth = |i: usize| terms.get(i).map_or(0, Product::depth);
        Self::new::<M>(depth(0), depth(1))
    }

    pub(super) fn total(self) -> usize {
        self.terms[0] + self.terms[1]
    }

    /// Where the second term begins.
    pub(super) fn second(self) -> usize {
        self.terms[0]
    }

    /// The block that begins at `start`: where one begins, or at 0.
    #[inline]
    pub(super) fn block(self, start: usize) -> Range<usize> {
        let [first, second] = self.terms;
        let (begin, depth) = if start < first { (0, first) } else { (first, second) };
        let step = depth.div_ceil(depth.div_ceil(self.most).max(1)).max(1).next_multiple_of(self.step);
        let end = (start + step - (start - begin) % step).min(begin + depth);
        let joins = end == first && second <= SHORT;
        start..if joins { self.total() } else { end }
    }

    pub(super) fn blocks(self) -> impl Iterator<Item = Range<usize>> {
        let next = move |block: &Range<usize>| Some(self.block(block.end)).filter(|block| !block.is_empty());
        std::iter::successors(Some(self.block(0)).filter(|block| !block.is_empty()), next)
    }

    /// The steps in the longest block.
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
        assert!(depth.blocks().all(|block| block.len() <= depth.longest() && block.len() <= M::DEPTH + SHORT));
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
        /// So the sum over `W` is made in the same order with an adapter and without.
        #[test]
        fn a_second_term_does_not_move_the_cuts_of_the_first(k in 1usize..4000, r in 0usize..1200) {
            for (alone, both, step) in [(cuts::<Fma>(k, 0), cuts::<Fma>(k, r), 1), (cuts::<Pairs>(k, 0), cuts::<Pairs>(k, r), 32)] {
                prop_assert_eq!(&alone[..alone.len() - 1], &both[..alone.len() - 1]);
                prop_assert!(both.windows(2).all(|cut| cut[0] < cut[1]) && both.iter().all(|cut| cut.is_multiple_of(step)));
                prop_assert_eq!(both[both.len() - 1], k.next_multiple_of(step) + r.next_multiple_of(step));
            }
        }
    }
}
