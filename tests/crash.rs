//! Temporary files of a killed process are removed by the next one; those of a running process are kept.
#![cfg(unix)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use lowrank::DType;
use lowrank::adapter::{Factors, Folder, HostMatrix};
use safetensors::tensor::{Dtype, TensorView, serialize};

const SIDE: usize = 3072;

/// Writes a model, as a file and as a folder, large enough that merging takes a while, and an adapter for it.
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

/// The incomplete files and folders of a folder.
fn incomplete(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with('.')).collect()
}

/// True if a process holds the lock of a file or a folder.
fn is_locked(path: &Path) -> bool {
    let Ok(locks) = fs::read_to_string("/proc/locks") else { return true };
    let inode = fs::metadata(path).map_or(0, |metadata| metadata.ino());
    locks.lines().filter_map(|lock| lock.split_whitespace().nth(5)).any(|id| id.ends_with(&format!(":{inode}")))
}

/// A running process, which is killed at the end of the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill(); // fails if it has ended already
        let _ = self.0.wait();
    }
}

/// Starts a process, and waits until it has begun to write.
fn begun(dir: &Path, base: &str, out: &str) -> Running {
    let child = Running(program(dir, base, out).spawn().unwrap());
    let start = Instant::now();
    while !incomplete(dir).iter().any(|name| is_locked(&dir.join(name))) {
        assert!(start.elapsed() < Duration::from_secs(60), "nothing was begun");
        std::thread::sleep(Duration::from_micros(200));
    }
    child
}

#[test]
fn files_of_a_killed_run_are_removed_by_the_next() {
    let desk = tempfile::tempdir().unwrap();
    let dir = desk.path();
    inputs(dir);
    for (base, out) in [("base/model.safetensors", "merged.safetensors"), ("base", "merged")] {
        let mut child = begun(dir, base, out);
        child.0.kill().unwrap();
        child.0.wait().unwrap();
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
fn files_of_a_running_process_are_kept() {
    let desk = tempfile::tempdir().unwrap();
    let dir = desk.path();
    inputs(dir);
    let signal = |child: &Running, signal: &str| {
        assert!(Command::new("kill").args([signal, &child.0.id().to_string()]).status().unwrap().success());
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
        assert!(child.0.wait().unwrap().success() && run.unwrap().success());
        assert!(dir.join(out).exists() && dir.join(other).exists() && incomplete(dir).is_empty());
    }
}
