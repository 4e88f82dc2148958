//! The tasks of a loop: on as many threads as there are, or all on this one.

use std::convert::Infallible;

use rayon::iter::plumbing::{Producer, ProducerCallback};
use rayon::prelude::*;

use super::Engine;

impl Engine<'_> {
    /// The same, for a loop that stays on this thread if it is little work, whatever the rest of the verb is.
    pub(super) fn sequential_if(self, small: bool) -> Self {
        Self { sequential: self.sequential || small, ..self }
    }

    /// How many threads share the work.
    pub(super) fn threads(self) -> usize {
        if self.sequential { 1 } else { rayon::current_num_threads() }
    }

    /// Does each task.
    pub(super) fn each<I>(self, tasks: I, task: impl Fn(I::Item) + Send + Sync)
    where
        I: IndexedParallelIterator,
    {
        let Ok(()) = self.try_each(tasks, |item| {
            task(item);
            Ok::<_, Infallible>(())
        });
    }

    /// Does each task, until one fails. Where this thread is sequential rayon is asked nothing: its first question would start threads.
    pub(super) fn try_each<I, F>(self, tasks: I, task: impl Fn(I::Item) -> Result<(), F> + Send + Sync) -> Result<(), F>
    where
        I: IndexedParallelIterator,
        F: Send,
    {
        if self.sequential { tasks.with_producer(InOrder(task)) } else { tasks.try_for_each(task) }
    }
}

/// Does tasks one after another.
struct InOrder<T>(T);

impl<I, F, T: Fn(I) -> Result<(), F>> ProducerCallback<I> for InOrder<T> {
    type Output = Result<(), F>;
    fn callback<P: Producer<Item = I>>(self, tasks: P) -> Result<(), F> {
        tasks.into_iter().try_for_each(self.0)
    }
}
