//! Runs the tasks of a loop, in parallel or on the calling thread.

use std::convert::Infallible;

use rayon::iter::plumbing::{Producer, ProducerCallback};
use rayon::prelude::*;

use super::Engine;
use crate::error;

impl Engine<'_> {
    /// A copy of this engine that is sequential if `small`.
    pub(super) fn sequential_if(self, small: bool) -> Self {
        Self { sequential: self.sequential || small, ..self }
    }

    /// Number of threads that share the work.
    pub(super) fn threads(self) -> usize {
        if self.sequential { 1 } else { rayon::current_num_threads() }
    }

    /// Runs the tasks `0..count` until one fails. A task is called through a pointer, so that rayon's loops are compiled once for all
    /// products instead of once for each type.
    pub(super) fn try_each_index(self, count: usize, task: &(dyn Fn(usize) -> error::Result<()> + Sync)) -> error::Result<()> {
        self.try_each((0..count).into_par_iter(), task)
    }

    /// Runs all tasks.
    pub(super) fn each<I>(self, tasks: I, task: impl Fn(I::Item) + Send + Sync)
    where
        I: IndexedParallelIterator,
    {
        let Ok(()) = self.try_each(tasks, |item| {
            task(item);
            Ok::<_, Infallible>(())
        });
    }

    /// Runs tasks until one fails. A sequential engine does not use rayon's pool, which would start its threads.
    pub(super) fn try_each<I, F>(self, tasks: I, task: impl Fn(I::Item) -> Result<(), F> + Send + Sync) -> Result<(), F>
    where
        I: IndexedParallelIterator,
        F: Send,
    {
        if self.sequential { tasks.with_producer(InOrder(task)) } else { tasks.try_for_each(task) }
    }
}

/// Runs tasks one after another.
struct InOrder<T>(T);

impl<I, F, T: Fn(I) -> Result<(), F>> ProducerCallback<I> for InOrder<T> {
    type Output = Result<(), F>;
    fn callback<P: Producer<Item = I>>(self, tasks: P) -> Result<(), F> {
        tasks.into_iter().try_for_each(self.0)
    }
}
