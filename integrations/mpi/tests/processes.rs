//! Processes that `mpirun` starts: they train what one process trains, with the same bits on all ranks; one that fails or is killed
//! ends the job and is named; a job that was killed is resumed with the same bits.
//!
//! Needs Linux; tried with Open MPI 4.1. Without `mpirun` the tests say so, and fail if `LOWRANK_REQUIRE` contains `mpi`.
#![cfg(target_os = "linux")]
#![allow(unreachable_pub, reason = "a test binary exports nothing")]

#[path = "processes/job.rs"]
mod job;
#[path = "../../../tests/support/ranks.rs"]
mod ranks;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use job::{Job, Network, kill_rank, mpirun_is_here};
use lowrank::distributed::SingleProcess;
use ranks::{Change, STEP_BYTES, apart, exact_step, losses_apart, rounding, trained};
use serde_json::Value;

/// A job whose rank failed must end within this time.
const SECONDS: Duration = Duration::from_secs(10);
/// The steps of a training run of `rank.rs`.
const STEPS: usize = 6;

/// What `rank.rs` wrote, by rank: its lines.
fn ranks_of(job: &Job, folder: &Path) -> Vec<Vec<String>> {
    let read = |rank| fs::read_to_string(folder.join(format!("rank-{rank}"))).unwrap().lines().map(String::from).collect();
    let lines: Vec<Vec<String>> = (0..job.ranks).map(read).collect();
    assert_eq!(fs::read_dir(folder).unwrap().count(), job.ranks);
    assert!(lines.iter().all(|lines| lines[0] == format!("size {}", job.ranks)), "{lines:?}");
    lines
}

/// Runs `rank.rs`; the lines of each rank after the first one.
fn run(what: &str, ranks: usize, network: Network) -> Vec<Vec<String>> {
    let folder = tempfile::tempdir().unwrap();
    let job = Job::new("rank", ranks, &[what, folder.path().to_str().unwrap()]).over(network);
    let ended = job.start().wait(Duration::from_secs(120));
    assert!(ended.success, "{what} with {ranks} ranks: {}", ended.stderr);
    ranks_of(&job, folder.path()).into_iter().map(|lines| lines[1..].to_vec()).collect()
}

fn bits(line: &str) -> Vec<u32> {
    line.split(' ').map(|word| u32::from_str_radix(word, 16).unwrap()).collect()
}

fn all_same(ranks: &[Vec<String>]) -> bool {
    ranks.iter().all(|lines| *lines == ranks[0])
}

#[test]
fn ranks_have_the_same_bits_and_learn_what_one_process_learns() {
    if !mpirun_is_here() {
        return;
    }
    let (one, (adapters, losses)) = (trained::<f32>(&SingleProcess, STEPS), rounding(STEPS));
    let far = |lines: &[String]| {
        let shown: Vec<(f32, f64)> = bits(&lines[3]).into_iter().map(|loss| (f32::from_bits(loss), 0.0)).collect();
        (apart(&bits(&lines[2]), &one.0) / adapters, losses_apart(&shown, &one.1) / losses)
    };
    for (ranks, network) in [(1, Network::Any), (2, Network::Any), (2, Network::Loopback), (3, Network::Any), (4, Network::Any)] {
        let got = run("train", ranks, network);
        assert!(all_same(&got), "{ranks} ranks: {got:?}");
        let (of_adapters, of_losses) = far(&got[0]);
        println!("{ranks} ranks, {network:?}: {of_adapters:.3} and {of_losses:.3} of what rounding explains");
        assert!(of_adapters <= 1.0 && of_losses <= 1.0, "{ranks} ranks: {of_adapters}, {of_losses}");
        if ranks > 1 {
            assert_eq!(got[0][..2], [format!("calls {STEPS}"), format!("bytes {}", STEPS * STEP_BYTES)], "one collective a step");
        }
    }
    // These faults must not pass.
    let (of_adapters, of_losses) = far(&run("train-wrong", 2, Network::Any)[0]);
    assert!(of_adapters > 10.0 && of_losses > 10.0, "a rank with the share of another: {of_adapters}, {of_losses}");
    assert!(!all_same(&run("train-drift", 2, Network::Any)), "a rank with another bit");
}

#[test]
fn a_step_on_whole_numbers_has_the_bits_of_one_process() {
    if !mpirun_is_here() {
        return;
    }
    let one = exact_step(&SingleProcess, Change::Nothing);
    for ranks in [1, 2, 4] {
        assert!(run("exact", ranks, Network::Any).iter().all(|lines| bits(&lines[0]) == one), "{ranks} ranks");
    }
    assert!(bits(&run("exact-wrong", 2, Network::Any)[0][0]) != one, "a rank with the share of another");
}

#[test]
fn a_rank_that_fails_drifts_or_is_killed_ends_the_job_and_is_named() {
    if !mpirun_is_here() {
        return;
    }
    for (what, names) in [
        ("error", vec!["error on rank 1 of 3: cuda is unavailable: the device was lost"]),
        ("panic", vec!["an index is out of range", "error on rank 1 of 3: it panicked"]),
        ("drift", vec!["error on rank ", "of 3: cannot go on training: rank 1 has other parameters than rank 0"]),
        ("wait", vec!["rank 1", "signal 9"]),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let job = Job::new("rank", 3, &[what, folder.path().to_str().unwrap()]);
        let running = job.start();
        if what == "wait" {
            running.wait_for_output("rank 1 waits");
            kill_rank(&running, 1);
        }
        let since = Instant::now();
        let ended = running.wait(SECONDS);
        println!("{what}: ended after {:.1} s", since.elapsed().as_secs_f64());
        assert!(!ended.success && names.iter().all(|name| ended.stderr.contains(name)), "{what}: {}", ended.stderr);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "{what}: no rank has come to its end");
    }
}

/// `mnist_lora` on drawn digits: its folders, and its results.
struct Mnist {
    folder: tempfile::TempDir,
}

impl Mnist {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn job(&self, ranks: usize, more: &[&str]) -> Job {
        let (out, json, run) = (self.path("out"), self.path("figures.json"), self.path("run"));
        let paths = [out, json, run].map(|path| path.to_str().unwrap().to_string());
        let all = ["--distributed", "mpi", "--generate", "--limit", "300", "--batches", "60", "--threads", "1"];
        let saved = ["--out", &paths[0], "--json", &paths[1], "--checkpoint", &paths[2], "--checkpoint-every", "6"];
        Job::new("mnist_lora", ranks, &[&all[..], &saved[..], more].concat())
    }

    /// Runs a job to its end. Returns what it printed, and its figures.
    fn run(&self, ranks: usize, more: &[&str]) -> (String, Value) {
        let ended = self.job(ranks, more).start().wait(Duration::from_secs(300));
        assert!(ended.success, "{ranks} ranks: {}", ended.stderr);
        (ended.stdout, serde_json::from_slice(&fs::read(self.path("figures.json")).unwrap()).unwrap())
    }

    /// Starts a job and kills a rank of it as soon as it has saved its first checkpoint of a phase.
    fn killed(&self, ranks: usize, rank: usize, phase: &str, more: &[&str]) {
        let running = self.job(ranks, more).start();
        let (checkpoint, began) = (self.path("run").join(format!("{phase}.safetensors")), Instant::now());
        while !checkpoint.exists() {
            assert!(began.elapsed() < Duration::from_secs(300), "there is no {}", checkpoint.display());
            std::thread::sleep(Duration::from_millis(5));
        }
        kill_rank(&running, rank);
        let since = Instant::now();
        let ended = running.wait(SECONDS);
        println!("rank {rank} of {ranks} killed in {phase}: ended after {:.1} s", since.elapsed().as_secs_f64());
        assert!(!ended.success && ended.stderr.contains(&format!("rank {rank}")), "{}", ended.stderr);
        assert!(!self.path("out").exists() && !self.path("figures.json").exists(), "a job that was killed has no results");
    }
}

/// The digest of all weights, and all losses.
fn results(figures: &Value) -> [&Value; 3] {
    let results = ["weights_sha256", "pretrain_losses", "tune_losses"].map(|key| &figures[key]);
    assert!(results[0].as_str().unwrap().len() == 64 && results[1].as_array().unwrap().len() == 30);
    assert_eq!(results[2].as_array().unwrap().len(), 60);
    results
}

fn yes(stdout: &str) -> usize {
    stdout.lines().filter(|line| line.starts_with("yes ")).count()
}

#[test]
fn the_main_job_trains_on_several_processes() {
    if !mpirun_is_here() {
        return;
    }
    let run = |ranks| {
        let mnist = Mnist::new();
        let (stdout, figures) = mnist.run(ranks, &[]);
        assert_eq!((yes(&stdout), stdout.matches("backend ").count()), (4, 1), "one rank prints: {stdout}");
        let files: BTreeSet<_> = fs::read_dir(mnist.path("out")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert!(files.iter().eq(["adapter", "errors.svg", "loss.svg"]), "{files:?}");
        let (step, steps) = (figures["pretrain_seconds"].as_f64().unwrap(), figures["pretrain_steps"].as_f64().unwrap());
        println!("{ranks} ranks: {:.1} ms a step", 1e3 * step / steps);
        figures
    };
    let (one, first) = (run(1), |figures: &Value| figures["pretrain_losses"][0].as_f64().unwrap());
    for ranks in [2, 4] {
        let figures = run(ranks);
        results(&figures);
        // The first loss is that of ten rows of logits, sums of 784, 1000 and 2000 terms: the program's own bound for them, 3e-5 of
        // the largest logit, which is about 1 before the training; a loss moves by at most twice as much.
        assert!((first(&figures) - first(&one)).abs() < 6e-5, "{ranks} ranks");
    }
}

#[test]
fn a_killed_job_is_resumed_with_the_bits_of_an_uninterrupted_one() {
    if !mpirun_is_here() {
        return;
    }
    let whole = [1, 2].map(|ranks| Mnist::new().run(ranks, &[]).1);
    for (ranks, rank, phase) in [(1, 0, "training"), (2, 1, "training"), (2, 0, "tuning")] {
        let mnist = Mnist::new();
        mnist.killed(ranks, rank, phase, &[]);
        let (stdout, figures) = mnist.run(ranks, &["--resume"]);
        assert_eq!(yes(&stdout), 4, "{stdout}");
        assert_eq!(results(&figures), results(&whole[ranks - 1]), "rank {rank} of {ranks} killed in {phase}");
    }
    // The checkpoint of two ranks goes on with one: the steps before it are those of two.
    let mnist = Mnist::new();
    mnist.killed(2, 1, "tuning", &[]);
    let (_, figures) = mnist.run(1, &["--resume"]);
    assert_eq!(figures["pretrain_losses"], whole[1]["pretrain_losses"]);
    assert_ne!(figures["pretrain_losses"], whole[0]["pretrain_losses"]);
}

#[test]
fn an_error_of_rank_0_ends_all_and_says_why() {
    if !mpirun_is_here() {
        return;
    }
    let mnist = Mnist::new();
    fs::write(mnist.path("run"), "a file in the place of the folder").unwrap();
    let ended = mnist.job(2, &[]).start().wait(Duration::from_secs(120));
    assert!(
        !ended.success && ended.stderr.contains("error on rank 0 of 2: ") && ended.stderr.contains("/run"),
        "{}",
        ended.stderr
    );
    assert!(!mnist.path("out").exists());
    let ended = Job::new("mnist_lora", 2, &["--generate"]).start().wait(Duration::from_secs(60));
    assert!(!ended.success && ended.stderr.contains("`--distributed mpi` lets them train together"), "{}", ended.stderr);
}
