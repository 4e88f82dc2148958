//! `out = Σ wᵢ·tᵢ` over pruned tensors, as a plain sum or with sign election: the building block of TIES, DARE and magnitude pruning.

use std::cmp::Ordering;

use super::combine::MajoritySign;
use crate::random::Rng;

/// Which elements of a tensor are kept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Pruning {
    /// All.
    Nothing,
    /// This fraction of them, the largest by magnitude.
    Magnitude(f64),
    /// Each with this probability, divided by it.
    Random(f64),
}

/// How several tensors are combined into one.
pub(super) struct Mix {
    pruning: Pruning,
    election: Option<MajoritySign>,
    rng: Rng,
}

impl Mix {
    pub(super) fn new(pruning: Pruning, election: Option<MajoritySign>, seed: u64) -> Self {
        Self { pruning, election, rng: Rng::new(seed) }
    }

    /// Combines tensors of equal length, each with its weight.
    pub(super) fn run(&mut self, mut tasks: Vec<Vec<f64>>, weights: &[f64]) -> Vec<f64> {
        tasks.iter_mut().for_each(|task| self.prune(task));
        let len = tasks.first().map_or(0, Vec::len);
        let weighted = |at: usize, of: &dyn Fn(f64) -> bool| -> (f64, usize) {
            let chosen = tasks.iter().zip(weights).filter(|(task, _)| of(task[at]));
            chosen.fold((0.0, 0), |(sum, count), (task, weight)| (sum + weight * task[at], count + 1))
        };
        let Some(method) = self.election else { return (0..len).map(|at| weighted(at, &|_| true).0).collect() };
        let elected = |at: usize| {
            let sign = majority(method, tasks.iter().map(|task| task[at]));
            let (sum, count) = weighted(at, &|value| value * sign > 0.0);
            sum / count.max(1) as f64
        };
        (0..len).map(elected).collect()
    }

    fn prune(&mut self, task: &mut [f64]) {
        match self.pruning {
            Pruning::Nothing => {}
            Pruning::Magnitude(density) => keep_largest(task, (density * task.len() as f64) as usize),
            Pruning::Random(density) => {
                task.iter_mut().for_each(|value| *value = if self.rng.unit() < density { *value / density } else { 0.0 });
            }
        }
    }
}

/// The elected sign, 1 or -1; 1 for a tie. The weights of the adapters are not considered, as in PEFT.
fn majority(method: MajoritySign, values: impl Iterator<Item = f64>) -> f64 {
    let votes: f64 = match method {
        MajoritySign::Total => values.sum(),
        MajoritySign::Frequency => values.map(|value| if value == 0.0 { 0.0 } else { value.signum() }).sum(),
    };
    if votes >= 0.0 { 1.0 } else { -1.0 }
}

/// Sets all but the `count` largest elements to 0; of equal ones the first are kept.
fn keep_largest(task: &mut [f64], count: usize) {
    let mut order: Vec<usize> = (0..task.len()).collect();
    let larger = |&i: &usize, &j: &usize| -> Ordering { task[j].abs().total_cmp(&task[i].abs()).then(i.cmp(&j)) };
    if count > 0 && count < order.len() {
        order.select_nth_unstable_by(count - 1, larger);
    }
    order.into_iter().skip(count).for_each(|at| task[at] = 0.0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_are_kept_and_of_equals_the_first() {
        for (count, want) in
            [(0, [0.0; 5]), (1, [0.0, -3.0, 0.0, 0.0, 0.0]), (3, [2.0, -3.0, 0.0, 3.0, 0.0]), (9, [2.0, -3.0, -2.0, 3.0, 1.0])]
        {
            let mut task = [2.0, -3.0, -2.0, 3.0, 1.0];
            keep_largest(&mut task, count);
            assert_eq!(task, want, "{count}");
        }
    }

    #[test]
    fn sign_election_counts_votes_or_their_size_and_averages_the_majority() {
        let tasks = || vec![vec![5.0, -1.0, 1.0, 0.0], vec![-1.0, -3.0, -1.0, 0.0], vec![-2.0, 9.0, 0.0, 0.0]];
        let weights = [1.0, 2.0, -1.0];
        let total = Mix::new(Pruning::Nothing, Some(MajoritySign::Total), 0).run(tasks(), &weights);
        assert_eq!(total, [5.0, -9.0, 1.0, 0.0]);
        let frequency = Mix::new(Pruning::Nothing, Some(MajoritySign::Frequency), 0).run(tasks(), &weights);
        assert_eq!(frequency, [0.0, -3.5, 1.0, 0.0]);
        assert_eq!(Mix::new(Pruning::Nothing, None, 0).run(tasks(), &weights), [5.0, -16.0, -1.0, 0.0]);
    }

    #[test]
    fn random_pruning_keeps_its_fraction_and_the_mean() {
        let ones = || vec![vec![1.0; 100_000]];
        let run = |seed| Mix::new(Pruning::Random(0.25), None, seed).run(ones(), &[1.0]);
        let kept = run(3);
        assert!(kept.iter().all(|&value| value == 0.0 || value == 4.0));
        let mean = kept.iter().sum::<f64>() / kept.len() as f64;
        assert!((mean - 1.0).abs() < 6.0 * (3.0f64 / 1e5).sqrt(), "{mean}"); // six standard deviations
        assert_eq!(kept, run(3));
        assert_ne!(kept, run(4));
    }
}
