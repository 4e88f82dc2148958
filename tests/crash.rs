//! What a killed run leaves is gone after the next, and what a living run is writing is not.
#![cfg(unix)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use lowrank::DType;
use lowrank::adapter::{Factors, Folder, HostMatrix};
use safetensors::tensor::{Dtype, TensorView, serialize};

const SIDE: usize = 3072;

/// A model in a file and in a folder, large enough that merging takes a while, and an adapter for it.
fn inputs(dir: &Path) {
    let zeros = vec![0; 4 * SIDE * SIDE];
    let weight = TensorView::new(Dtype::F32, vec![SIDE, SIDE], &zeros).unwrap();
    fs::create_dir(dir.join("base")).unwrap();
    fs::write(dir.join("base/model.safetensors"), serialize([("layer.weight", weight)], None).unwrap()).unwrap();
    let a = HostMatrix::new((1, SIDE), vec![1.0; SIDE]).unwrap();
    let factors = Factors { b: a.transposed(), a, scaling: 1.0, dtype: DType::F32 };
    Folder::new(None, BTreeMap::from([("layer".to_string(), factors)])).unwrap().write(&dir.join("adapter")).unwrap();
}

fn program(dir: &Path, base: &str, out: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lowrank"));
    command.args(["merge", "--base", base, "--adapter", "adapter", "--out", out]).current_dir(dir);
    command
}

/// Files and folders that are not complete.
fn incomplete(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with('.')).collect()
}

/// A run that has begun to write, and is not done.
fn begun(dir: &Path, base: &str, out: &str) -> Child {
    let child = program(dir, base, out).spawn().unwrap();
    let start = Instant::now();
    while incomplete(dir).is_empty() {
        assert!(start.elapsed() < Duration::from_secs(60), "nothing was begun");
        std::thread::sleep(Duration::from_micros(200));
    }
    child
}

#[test]
fn what_a_killed_run_left_is_removed_by_the_next() {
    let desk = tempfile::tempdir().unwrap();
    let dir = desk.path();
    inputs(dir);
    for (base, out) in [("base/model.safetensors", "merged.safetensors"), ("base", "merged")] {
        let mut child = begun(dir, base, out);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!dir.join(out).exists());
        assert_eq!(incomplete(dir).len(), 1, "{out}");
        fs::write(dir.join(".notes.1-2"), "not ours").unwrap();
        assert!(program(dir, base, out).status().unwrap().success());
        assert!(dir.join(out).exists());
        assert_eq!(incomplete(dir), [".notes.1-2"], "{out}");
        fs::remove_file(dir.join(".notes.1-2")).unwrap();
    }
}

#[test]
fn what_a_living_run_writes_stays() {
    let desk = tempfile::tempdir().unwrap();
    let dir = desk.path();
    inputs(dir);
    let signal = |child: &Child, signal: &str| {
        assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
    };
    for (base, out) in [("base/model.safetensors", "merged.safetensors"), ("base", "merged")] {
        let mut child = begun(dir, base, out);
        signal(&child, "-STOP");
        let living = incomplete(dir);
        assert_eq!(living.len(), 1, "{out}");
        let other = format!("other-{out}");
        let run = program(dir, base, &other).status();
        assert_eq!(incomplete(dir), living, "{out}");
        signal(&child, "-CONT");
        assert!(child.wait().unwrap().success() && run.unwrap().success());
        assert!(dir.join(out).exists() && dir.join(other).exists() && incomplete(dir).is_empty());
    }
}
