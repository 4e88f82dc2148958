//! The experiment of `examples/mnist_lora` on generated digits and a small network: the adapters improve the worst digit, and the
//! base does not change.

#![allow(dead_code, reason = "the example uses all of its modules")]
#![allow(unreachable_pub, reason = "a test binary exports nothing")]

#[path = "../examples/mnist_lora/experiment.rs"]
mod experiment;
#[path = "../examples/mnist_lora/mnist/mod.rs"]
mod mnist;
#[path = "../examples/mnist_lora/whole.rs"]
mod whole;

use experiment::{Outcome, Progress, Settings, difference, same_bits};
use lowrank::{Backend, Cpu, Error, Result, bf16};
use mnist::Mnist;

fn settings() -> Settings {
    let (seed, hidden, epochs, batch, lr) = (5, vec![24, 16], 1, 10, 3e-3);
    Settings { seed, hidden, epochs, batch, lr, rank: 1, alpha: 1.0, batches: 40, digit: None, quantise: None }
}

fn run<B: Backend>(backend: &B, settings: &Settings, watch: &mut dyn FnMut(&Progress)) -> Result<Outcome> {
    let dir = tempfile::tempdir().unwrap();
    experiment::run(backend, &Mnist::generate(5, 1500, 500), settings, dir.path(), watch)
}

fn run_small<B: Backend>(backend: &B) -> Outcome {
    run(backend, &settings(), &mut |_| {}).unwrap()
}

/// Asserts what must hold on every backend and element type.
fn assert_story(outcome: &Outcome) {
    let Outcome { base, digit, on, off, reloaded, merged_difference, merged_tolerance, .. } = outcome;
    assert!(base.accuracy > 0.7, "the base learns: {}", base.accuracy);
    let digit = usize::from(*digit);
    assert_eq!(base.errors.iter().max(), Some(&base.errors[digit]), "the worst digit is chosen");
    assert!(on.errors[digit] * 2 <= base.errors[digit], "digit {digit}: {:?}, then {:?}", base.errors, on.errors);
    assert!(outcome.base_unchanged);
    assert!(off == base, "off is not what it was before");
    assert!(reloaded == on, "reloaded is not what was saved");
    assert!(on.logits != base.logits, "adapters that change nothing would pass the rest");
    assert!(merged_difference <= merged_tolerance, "merged is {merged_difference} away, {merged_tolerance} at most");
}

#[test]
fn adapters_improve_the_worst_digit_and_keep_the_base() {
    let outcome = run_small(&Cpu::<f32>::new().unwrap());
    assert_story(&outcome);
    assert_eq!(outcome.params.original, 784 * 24 + 24 + 24 * 16 + 16 + 16 * 10 + 10);
    assert_eq!(outcome.params.introduced, 784 + 24 + 24 + 16 + 16 + 10);
    assert_eq!((outcome.pretrain.losses.len(), outcome.tune.losses.len()), (150, 40));
    let shown: Vec<usize> = outcome.base.errors.iter().chain(&outcome.merged.errors).copied().collect();
    assert!(shown.iter().all(|&errors| errors <= 500));
}

#[test]
fn sixteen_bit_weights_give_the_same_results() {
    assert_story(&run_small(&Cpu::<bf16>::new().unwrap()));
}

/// Means of 15 steps each. Vector units without fused multiply-add round differently, and Adam's division amplifies the
/// difference (AVX-512, AVX2 and scalar: 3e-7). The rest allows for another machine's sine function, which may change a shade of
/// a generated digit.
const LOSSES: [f32; 10] =
    [2.2224567, 2.1247501, 1.7909131, 1.4994864, 1.3620938, 1.0860733, 0.93678796, 0.9137313, 1.0302033, 0.8388789];
const LOSSES_WITHIN: f32 = 1e-4;

#[test]
fn the_losses_are_those_written_down() {
    let losses = run_small(&Cpu::<f32>::new().unwrap()).pretrain.losses;
    let means: Vec<f32> = losses.chunks(15).map(|losses| losses.iter().sum::<f32>() / 15.0).collect();
    assert!(means.iter().zip(LOSSES).all(|(got, want)| (got - want).abs() <= LOSSES_WITHIN), "{means:?}");
}

#[test]
fn the_same_seed_gives_the_same_bits_on_any_number_of_threads() {
    let threads = |threads| run_small(&Cpu::<f32>::new().unwrap().with_threads(threads).unwrap());
    let (one, two) = (threads(1), threads(2));
    assert!(same_bits(&one.weights, &two.weights));
    assert_eq!((&one.pretrain.losses, &one.tune.losses), (&two.pretrain.losses, &two.tune.losses));
    assert!(one.on == two.on && one.merged == two.merged);
    let other = run(&Cpu::<f32>::new().unwrap(), &Settings { seed: 6, ..settings() }, &mut |_| {}).unwrap();
    assert!(!same_bits(&one.weights, &other.weights));
}

#[test]
fn progress_reaches_the_end_of_both_phases() {
    let mut seen = Vec::new();
    run(&Cpu::<f32>::new().unwrap(), &settings(), &mut |at| seen.push((at.phase, at.step, at.steps))).unwrap();
    assert_eq!(seen, [("training", 50, 150), ("training", 100, 150), ("training", 150, 150), ("tuning", 40, 40)]);
}

#[test]
fn settings_that_make_no_sense_are_refused() {
    let cpu = Cpu::<f32>::new().unwrap();
    let refused = |settings: Settings| match run(&cpu, &settings, &mut |_| {}).unwrap_err() {
        Error::Value { name, .. } => name,
        other => panic!("{other}"),
    };
    assert_eq!(refused(Settings { rank: 0, ..settings() }), "rank");
    assert_eq!(refused(Settings { alpha: f32::NAN, ..settings() }), "alpha");
    assert_eq!(refused(Settings { lr: -1.0, ..settings() }), "lr");
    assert_eq!(refused(Settings { digit: Some(10), ..settings() }), "digit");
    assert_eq!(refused(Settings { lr: 1e30, ..settings() }), "loss");
}

/// Within rounding: the low-rank term lengthens the sums of the blocked regime, which cuts them at other places then.
#[test]
fn an_adapter_that_was_not_tuned_changes_nothing() {
    let settings = Settings { epochs: 0, batches: 0, ..settings() };
    let untuned = run(&Cpu::<f32>::new().unwrap(), &settings, &mut |_| {}).unwrap();
    assert!(difference(&untuned.base.logits, &untuned.on.logits) <= untuned.merged_tolerance);
    assert!(untuned.off == untuned.base && untuned.base_unchanged);
}

/// Over 4 and 8 bits the adapters learn what they learn over 32, and the weights stay what they are.
#[test]
fn adapters_are_tuned_over_quantised_weights() {
    for kind in ["nf4", "int8"] {
        let settings = Settings { quantise: Some(kind.parse().unwrap()), ..settings() };
        let outcome = run(&Cpu::<f32>::new().unwrap(), &settings, &mut |_| {}).unwrap();
        let full = outcome.full.as_ref().unwrap();
        assert!(outcome.base_unchanged && outcome.off == outcome.base && outcome.reloaded == outcome.on, "{kind}");
        assert!(outcome.merged_difference <= outcome.merged_tolerance, "{kind}: {}", outcome.merged_difference);
        let digit = usize::from(outcome.digit);
        assert!(outcome.on.errors[digit] < full.base.errors[digit].max(1), "{kind}");
        assert!((outcome.on.accuracy - full.on.accuracy).abs() < 0.05, "{kind}");
        // Of 4 bytes a weight: 0.52, and 1.01 to 1.17 in rows of 784 to 24.
        let most = full.bytes * if kind == "nf4" { 15 } else { 26 } / 100;
        assert!(full.quantised_bytes < most, "{kind}: {} of {} bytes", full.quantised_bytes, full.bytes);
        assert!(outcome.base != full.base, "{kind}: quantising changes something");
    }
}
