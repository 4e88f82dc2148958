//! Reference cases from PyTorch and PEFT: those of tests/cases, and of every folder named in `LOWRANK_CASES` (a path list;
//! `../shared/cases` by default, if it is there). `cargo test --test cases` runs them alone.

mod support;

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use lowrank::{Cpu, VectorUnit};
use support::cases::{Case, Outputs, TOLERANCE, read, read_all};

/// Runs a case on every backend, each under a name. A new backend is a line here; its element type is `f32`, as the
/// tolerance is.
fn run_everywhere(case: &Case) -> Vec<(String, Result<Outputs, String>)> {
    let mut runs = Vec::new();
    for unit in VectorUnit::available() {
        for threads in [1, 2] {
            let cpu = Cpu::<f32>::new().unwrap().with_unit(unit).unwrap().with_threads(threads).unwrap();
            runs.push((lowrank::Backend::device(&cpu), case.run(&cpu)));
        }
    }
    #[cfg(feature = "webgpu")]
    if let Some(gpu) = support::devices::webgpu() {
        runs.push((lowrank::Backend::device(&gpu), case.run(&gpu)));
    }
    #[cfg(feature = "cuda")]
    {
        let emulated = support::emulator::Emulator::backend::<f32>();
        runs.push((lowrank::Backend::device(&emulated), case.run(&emulated)));
        if let Ok(gpu) = lowrank::Cuda::<f32>::new(0) {
            runs.push((lowrank::Backend::device(&gpu), case.run(&gpu)));
        }
    }
    runs
}

/// The root of the repository, or the folder where a bundle of tests was unpacked.
fn root() -> &'static Path {
    let repository = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    if repository.is_dir() { repository } else { Path::new(".") }
}

fn folders() -> Vec<PathBuf> {
    let root = root();
    let shared = root.join("../shared/cases");
    let more = match std::env::var_os("LOWRANK_CASES") {
        Some(list) => std::env::split_paths(&list).filter(|path| !path.as_os_str().is_empty()).collect(),
        None => Vec::from_iter(Some(shared).filter(|shared| shared.is_dir())),
    };
    [vec![root.join("tests/cases")], more].concat()
}

fn cases() -> Vec<(PathBuf, Vec<Case>)> {
    let read = |folder: PathBuf| (read_all(&folder).unwrap_or_else(|reason| panic!("{reason}")), folder);
    folders().into_iter().map(read).map(|(cases, folder)| (folder, cases)).collect()
}

/// Prints also without `--nocapture`, so that uncovered cases are visible.
fn say(line: &str) {
    std::io::stderr().write_all(format!("{line}\n").as_bytes()).unwrap();
}

#[test]
fn every_claimed_case_comes_out_on_every_backend() {
    let mut failures = Vec::new();
    for (folder, cases) in cases() {
        let mut covered = 0;
        let mut lines = Vec::new();
        for case in &cases {
            for (device, run) in run_everywhere(case) {
                let failed = run.map_or_else(|reason| vec![reason], |outputs| case.failures(&outputs));
                failures.extend(failed.into_iter().map(|failure| format!("{device}: {failure}")));
            }
            match case.unclaimed() {
                None => covered += 1,
                Some(reason) => lines.push(format!("  not covered: {} ({reason})", case.name)),
            }
        }
        say(&format!("{}: {covered} of {} cases covered", folder.display(), cases.len()));
        lines.iter().for_each(|line| say(line));
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn every_comparison_sees_one_spoiled_value() {
    let cpu = Cpu::<f32>::new().unwrap();
    for case in cases().into_iter().flat_map(|(_, cases)| cases).filter(|case| case.unclaimed().is_none()) {
        let outputs = case.run(&cpu).unwrap();
        let least = if case.name.starts_with("mixed_batch") { 1 } else { 4 }; // of a mixed batch there is only `y`
        assert!(case.want.len() >= least, "{}: {} outputs", case.name, case.want.len());
        for (name, want) in &case.want {
            let (last, shift) = (want.data.len() - 1, 10.0 * TOLERANCE * want.norm());
            for (at, spoiled) in [(0, want.data[0] + shift), (last, want.data[last] - shift), (last / 2, f64::NAN)] {
                let mut case = case.clone();
                case.want.get_mut(name).unwrap().data[at] = spoiled;
                let failures = case.failures(&outputs);
                assert!(failures.len() == 1 && failures[0].contains(name), "{}: {name}[{at}]: {failures:?}", case.name);
            }
            let mut outputs = outputs.clone();
            outputs.get_mut(name).unwrap()[last / 2] = f32::NAN;
            assert_eq!(case.failures(&outputs).len(), 1, "{}: {name} is NaN", case.name);
            outputs.remove(name);
            assert_eq!(case.failures(&outputs).len(), 1, "{}: {name} is missing", case.name);
        }
    }
}

#[test]
fn unreadable_cases_fail() {
    let ours = root().join("tests/cases");
    let folder = tempfile::tempdir().unwrap();
    assert!(read_all(folder.path()).unwrap_err().contains("no cases"));
    assert!(read_all(&folder.path().join("missing")).is_err());

    let whole = fs::read(ours.join("lora_linear_bias.safetensors")).unwrap();
    let cut = folder.path().join("cut.safetensors");
    fs::write(&cut, &whole[..whole.len() - 1]).unwrap();
    assert!(read(&cut).unwrap_err().contains("cut.safetensors"));
    assert!(read_all(folder.path()).is_err());

    let empty = folder.path().join("peft_empty");
    fs::create_dir(&empty).unwrap();
    assert!(read(&empty).unwrap_err().contains("peft_empty"));
}
