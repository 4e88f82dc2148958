//! The experiment of `examples/mnist_lora` on generated digits and a small network: the adapters improve the worst digit, and the
//! base does not change.

#![allow(dead_code, reason = "the example uses all of its modules")]
#![allow(unreachable_pub, reason = "a test binary exports nothing")]

#[path = "../examples/mnist_lora/experiment.rs"]
mod experiment;
#[path = "../examples/mnist_lora/mnist/mod.rs"]
mod mnist;
#[path = "../examples/mnist_lora/train.rs"]
mod train;
#[path = "../examples/mnist_lora/whole.rs"]
mod whole;

use std::path::Path;

use experiment::{Outcome, Progress, Settings, difference, same_bits};
use lowrank::distributed::{Communicator, SingleProcess, Threads};
use lowrank::nn::{Adaptable, Mlp};
use lowrank::random::Rng;
use lowrank::{Backend, Cpu, Error, Result, bf16};
use mnist::Mnist;
use train::{Checkpoints, Job, train};

fn settings() -> Settings {
    let (seed, hidden, epochs, batch, lr) = (5, vec![24, 16], 1, 10, 3e-3);
    Settings { seed, hidden, epochs, batch, lr, rank: 1, alpha: 1.0, batches: 40, digit: None, quantise: None, checkpoints: None }
}

fn run<B: Backend>(backend: &B, settings: &Settings, watch: &mut dyn FnMut(&Progress)) -> Result<Outcome> {
    let dir = tempfile::tempdir().unwrap();
    let outcome = experiment::run((backend, &SingleProcess), &Mnist::generate(5, 1500, 500), settings, dir.path(), watch)?;
    Ok(outcome.expect("rank 0 has the results"))
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

/// Stops a run at a step, as a killed process would: nothing after the last checkpoint is left.
fn interrupt(settings: &Settings, at: (&'static str, usize)) {
    let stopped = std::panic::catch_unwind(|| {
        let stop = &mut |progress: &Progress| assert!((progress.phase, progress.step) != at, "the run is interrupted here");
        run(&Cpu::<f32>::new().unwrap(), settings, stop)
    });
    assert!(stopped.is_err(), "the run ended before {at:?}");
}

#[test]
fn a_resumed_run_gives_the_bits_of_an_uninterrupted_one() {
    let whole = run_small(&Cpu::<f32>::new().unwrap());
    let same = |other: &Outcome| {
        same_bits(&whole.weights, &other.weights)
            && (&whole.pretrain.losses, &whole.tune.losses) == (&other.pretrain.losses, &other.tune.losses)
            && whole.on == other.on
    };
    for at in [("training", 80), ("training", 150), ("tuning", 20), ("tuning", 40)] {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = |resume| Some(Checkpoints { dir: folder.path().join("run"), every: 20, resume });
        interrupt(&Settings { checkpoints: checkpoints(false), ..settings() }, at);
        let mut steps = Vec::new();
        let resumed = Settings { checkpoints: checkpoints(true), ..settings() };
        let outcome = run(&Cpu::<f32>::new().unwrap(), &resumed, &mut |at| steps.push((at.phase, at.step))).unwrap();
        assert!(same(&outcome), "interrupted at {at:?}");
        assert!(!steps.contains(&at) && !steps.contains(&("training", 20)), "{at:?} was made again: {steps:?}");
        let again = run(&Cpu::<f32>::new().unwrap(), &resumed, &mut |at| panic!("{} {}", at.phase, at.step)).unwrap();
        assert!(same(&again), "a complete run is only scored");
    }
}

#[test]
fn a_folder_of_another_run_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let cpu = Cpu::<f32>::new().unwrap();
    let checkpoints = |resume| Some(Checkpoints { dir: folder.path().into(), every: 50, resume });
    let refused = |settings: Settings| run(&cpu, &settings, &mut |_| {}).unwrap_err().to_string();
    assert!(refused(Settings { checkpoints: checkpoints(true), ..settings() }).contains("is not there"));
    run(&cpu, &Settings { checkpoints: checkpoints(false), ..settings() }, &mut |_| {}).unwrap();
    assert!(refused(Settings { checkpoints: checkpoints(false), ..settings() }).contains("`--resume` goes on"));
    let other = refused(Settings { checkpoints: checkpoints(true), lr: 1e-3, ..settings() });
    assert!(other.contains("other settings") && other.contains("lr 0.001"), "{other}");
}

/// Trains on some ranks; only rank 0 has results.
fn on_ranks(size: usize, dir: &Path, settings: &Settings) -> Vec<Option<Outcome>> {
    let train = |comm: Threads| {
        let cpu = Cpu::<f32>::new().unwrap().with_threads(1).unwrap();
        let dir = dir.join(format!("adapter-{}", comm.rank()));
        let outcome = experiment::run((&cpu, &comm), &Mnist::generate(5, 1500, 500), settings, &dir, &mut |_| {}).unwrap();
        assert_eq!((outcome.is_some(), dir.exists()), (comm.rank() == 0, comm.rank() == 0));
        outcome
    };
    std::thread::scope(|scope| {
        let ranks: Vec<_> = Threads::group(size).into_iter().map(|comm| scope.spawn(move || train(comm))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// Batches of 10 images on 3 ranks: a rank has 3 or 4 of them.
#[test]
fn ranks_train_together_what_one_process_trains() {
    let folder = tempfile::tempdir().unwrap();
    let alone = run_small(&Cpu::<f32>::new().unwrap());
    let outcome = on_ranks(3, folder.path(), &settings()).remove(0).unwrap();
    assert_story(&outcome);
    let losses = alone.pretrain.losses.iter().zip(&outcome.pretrain.losses);
    assert!(losses.clone().all(|(a, b)| (a - b).abs() < 2e-2), "{:?}", losses.map(|(a, b)| (a - b).abs()).fold(0f32, f32::max));

    // The checkpoint of three ranks goes on with two: the batches are the same.
    let checkpoints = Checkpoints { dir: folder.path().join("run"), every: 50, resume: false };
    let settings = Settings { checkpoints: Some(checkpoints.clone()), ..settings() };
    let whole = on_ranks(3, folder.path(), &settings).remove(0).unwrap();
    assert!(same_bits(&whole.weights, &outcome.weights), "a checkpoint changes nothing");
    std::fs::remove_file(folder.path().join("run/tuning.safetensors")).unwrap();
    let settings = Settings { checkpoints: Some(Checkpoints { resume: true, ..checkpoints }), ..settings };
    let resumed = on_ranks(2, folder.path(), &settings).remove(0).unwrap();
    assert_eq!(resumed.pretrain.losses, whole.pretrain.losses);
    assert_story(&resumed);
}

/// The weights of the base after some steps. With a seed, about half of the first ones are the next `f32` away from zero.
fn base_after(comm: &impl Communicator, steps: usize, last_bits: Option<u64>) -> Vec<f32> {
    let (cpu, mnist, rng) = (&Cpu::<f32>::new().unwrap().with_threads(1).unwrap(), Mnist::generate(5, 1500, 1), &mut Rng::new(5));
    let mut mlp = Mlp::new(cpu, &[784, 24, 16, 10], rng).unwrap();
    if let Some(seed) = last_bits {
        let change = &mut Rng::new(seed);
        for param in mlp.params_mut() {
            let bits = param.tensor().to_vec(cpu).unwrap().into_iter().map(f32::to_bits);
            let changed: Vec<f32> = bits.map(|bits| f32::from_bits(bits + change.below(2) as u32)).collect();
            param.copy_from_slice(cpu, &changed).unwrap();
        }
    }
    let mut batches = mnist::shuffled_batches(mnist.train.all(), 10, rng);
    batches.truncate(steps);
    let job = Job {
        phase: "training",
        file: "training",
        split: &mnist.train,
        batches,
        lr: 3e-3,
        checkpoints: None,
        settings: String::new(),
        rng: rng.clone(),
    };
    train((cpu, comm), &mut mlp, job, &mut |_| {}).unwrap();
    mlp.layers().flat_map(|(_, layer)| layer.params()).flat_map(|param| param.tensor().to_vec(cpu).unwrap()).collect()
}

/// What ranks change is rounding, however many steps amplify it: no more than ten times what the last bits of the first weights do.
#[test]
fn ranks_change_what_the_last_bits_of_the_weights_change() {
    let apart = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt();
    for steps in [1, 10, 150] {
        let one = base_after(&SingleProcess, steps, None);
        let other = (1..=6).map(|seed| apart(&one, &base_after(&SingleProcess, steps, Some(seed)))).fold(0.0, f64::max);
        for size in [2, 3, 4] {
            let ranks = std::thread::scope(|scope| {
                let ranks = Threads::group(size).into_iter().map(|comm| scope.spawn(move || base_after(&comm, steps, None)));
                ranks.collect::<Vec<_>>().into_iter().map(|rank| rank.join().unwrap()).collect::<Vec<_>>()
            });
            assert!(same_bits(&ranks[1..], &vec![ranks[0].clone(); size - 1]));
            println!("{steps} steps, {size} ranks: {:.1e}, last bits: {other:.1e}", apart(&one, &ranks[0]));
            assert!(apart(&one, &ranks[0]) <= 10.0 * other, "{steps} steps, {size} ranks");
        }
    }
}
