//! Faults of the system, for every command that writes: whatever happens, an output is complete or not there, an old one stays
//! until then, and the message names the file.
//!
//! `scripts/check-faults` repeats it with more kills, and on a disk that is really full.
#![cfg(unix)]

#[path = "desk/mod.rs"]
mod desk;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use desk::Desk;
use serde_json::json;

/// Every command that writes; the output is called `out`.
const COMMANDS: [&str; 12] = [
    "merge --base base --adapter adapter --out out",
    "merge --base base/model.safetensors --adapter adapter --keep-residue residue --out out",
    "merge --base small --adapter adapter --requantise nf4 --out out",
    "unmerge --base merged --adapter adapter --residue kept --out out",
    "extract --base base --tuned merged --rank 2 --out out",
    "compress adapter --rank 1 --out out",
    "combine adapter other --type linear --out out",
    "convert base --dtype bf16 --out out",
    "convert adapter --to kohya --prefix lora_te --out out",
    "convert adapter --to mlx-lm --out out",
    "quantise base --type nf4 --out out",
    "dequantise small --out out",
];
/// The contents of files, by path.
type Tree = BTreeMap<PathBuf, Vec<u8>>;

/// A desk with a model, adapters, a merged model with its residue and a quantised model.
fn inputs() -> Desk {
    const SIDE: usize = 256;
    let desk = Desk::new();
    let weights = ["a", "b", "c", "d"].map(|name| format!("{name}.weight"));
    let tensors: Vec<_> = weights.iter().map(|name| (name.as_str(), &[SIDE, SIDE][..])).collect();
    desk.tensors("base/model.safetensors", &tensors);
    desk.json("base/config.json", &json!({"model_type": "llama"}));
    for name in ["adapter", "other"] {
        desk.adapter(name, &["a", "b", "c", "d"].map(|name| (name, [SIDE, SIDE, 2])), &json!({"lora_alpha": 0.001}));
    }
    desk.good("merge --base base --adapter adapter --keep-residue kept --out merged", &[]);
    desk.good("quantise base --type nf4 --out small", &[]);
    desk
}

/// The files below a path, or the file itself.
fn tree(path: &Path) -> Tree {
    if !path.is_dir() {
        return fs::read(path).map(|bytes| (PathBuf::new(), bytes)).into_iter().collect();
    }
    let inside = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path());
    let below = |path: PathBuf| {
        let name = PathBuf::from(path.file_name().unwrap());
        tree(&path).into_iter().map(move |(rest, bytes)| (name.join(rest), bytes))
    };
    inside.flat_map(below).collect()
}

/// The two outputs of a merge that keeps a residue; the second is empty otherwise.
fn outputs(desk: &Desk) -> [Tree; 2] {
    ["out", "residue"].map(|name| tree(&desk.path(name)))
}

fn remove(path: &Path) {
    if path.is_dir() { fs::remove_dir_all(path).unwrap() } else { drop(fs::remove_file(path)) }
}

/// Removes the outputs, and with `old` writes others in their place.
fn prepare(desk: &Desk, line: &str, old: bool) -> [Tree; 2] {
    ["out", "residue"].iter().for_each(|name| remove(&desk.path(name)));
    let folder = !line.contains("kohya") && !line.contains("base/model.safetensors");
    if old && folder {
        desk.write("out/adapter_model.safetensors", "old");
    } else if old {
        desk.write("out", "old");
    }
    if old && line.contains("--keep-residue") {
        desk.write("residue", "old");
    }
    outputs(desk)
}

fn program(desk: &Desk, line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lowrank"));
    command.args(line.split_whitespace()).current_dir(desk.path("")).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Asserts that the program failed with a message that contains these words and no temporary name.
#[track_caller]
fn refused(output: Output, line: &str, words: &[&str]) {
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "lowrank {line}: {message}");
    assert!(message.starts_with("lowrank: ") && !message.contains(".lowrank") && !message.contains("panicked"), "{message}");
    words.iter().for_each(|word| assert!(message.contains(word), "lowrank {line}: {message}: no {word}"));
}

/// A process that has begun to write and is stopped.
struct Stopped(Child);

impl Stopped {
    fn begun(desk: &Desk, line: &str) -> Self {
        let child = Self(program(desk, line).spawn().unwrap());
        let start = Instant::now();
        while !desk.names().iter().any(|name| name.starts_with('.')) {
            assert!(start.elapsed() < Duration::from_secs(60), "nothing was begun");
        }
        child.signal("-STOP");
        child
    }

    fn signal(&self, signal: &str) {
        assert!(Command::new("kill").args([signal, &self.0.id().to_string()]).status().unwrap().success());
    }

    fn go_on(self) -> Output {
        self.signal("-CONT");
        self.0.wait_with_output().unwrap()
    }
}

#[test]
fn a_command_that_is_killed_leaves_the_old_output_or_the_new_one() {
    let kills = std::env::var("LOWRANK_KILLS").map_or(3, |kills| kills.parse().unwrap());
    let (desk, mut chance) = (inputs(), lowrank::random::Rng::new(22));
    let before = desk.names();
    for (line, old) in COMMANDS.iter().flat_map(|line| [(line, false), (line, true)]) {
        prepare(&desk, line, false);
        let start = Instant::now();
        desk.good(line, &[]);
        let (took, new) = (start.elapsed(), outputs(&desk));
        let overwriting = format!("{line} --overwrite");
        let mut found = [0, 0];
        for _ in 0..kills {
            let was = prepare(&desk, line, old);
            let mut child = program(&desk, if old { &overwriting } else { line }).spawn().unwrap();
            std::thread::sleep(took.mul_f32(1.1 * chance.unit() as f32));
            child.kill().unwrap();
            child.wait().unwrap();
            let [out, residue] = outputs(&desk);
            assert!(out == was[0] || out == new[0], "{line}: {:?}", out.keys());
            assert!(residue == was[1] || residue == new[1], "{line}: {:?}", residue.keys());
            assert!(out == was[0] || residue == new[1], "{line}: the model is there, and its residue is not");
            found[usize::from(out == new[0])] += 1;
            desk.good(&overwriting, &[]);
            assert!(outputs(&desk) == new, "{line}");
            prepare(&desk, line, false);
            assert_eq!(desk.names(), before, "{line}");
        }
        println!("{line}: killed with the old output {} times, with the new one {} times", found[0], found[1]);
    }
}

#[test]
fn a_disk_without_room_is_an_error_that_names_the_output() {
    let desk = inputs();
    let before = desk.names();
    for (line, old) in COMMANDS.iter().flat_map(|line| [(line, false), (line, true)]) {
        let was = prepare(&desk, line, old);
        let line = if old { format!("{line} --overwrite") } else { line.to_string() };
        // A limit of 1 KB for each file, whose signal is ignored, so that writing fails.
        let mut limited = Command::new("sh");
        limited.args(["-c", "trap '' XFSZ; ulimit -f 2; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_lowrank")]);
        let output = limited.args(line.split_whitespace()).current_dir(desk.path("")).output().unwrap();
        refused(output, &line, &["File too large"]);
        assert!(outputs(&desk) == was, "{line}");
        prepare(&desk, &line, false);
        assert_eq!(desk.names(), before, "{line}");
    }
}

/// `scripts/check-faults` gives it a folder on a small disk.
#[test]
#[ignore = "needs LOWRANK_SMALL_DISK, a folder on a disk with less than 64 KB of room"]
fn a_full_disk_is_an_error_that_names_the_output() {
    let (desk, disk) = (inputs(), PathBuf::from(std::env::var_os("LOWRANK_SMALL_DISK").expect("LOWRANK_SMALL_DISK")));
    for line in COMMANDS.iter().filter(|line| !line.starts_with("compress")) {
        let line = line.replace("--out out", &format!("--out {}", disk.join("out").display()));
        refused(program(&desk, &line).output().unwrap(), &line, &["No space left on device", "/out"]);
        assert_eq!(fs::read_dir(&disk).unwrap().filter(|entry| entry.as_ref().unwrap().file_name() != "full").count(), 0);
        remove(&desk.path("residue"));
    }
}

/// The program as a user without rights: root may read and write everything.
fn without_rights(desk: &Desk, line: &str) -> Output {
    let program = desk.path("lowrank");
    if !program.exists() {
        fs::copy(env!("CARGO_BIN_EXE_lowrank"), &program).unwrap();
        fs::set_permissions(desk.path(""), fs::Permissions::from_mode(0o755)).unwrap();
    }
    let mut command = Command::new(program);
    if fs::metadata(desk.path("")).unwrap().uid() == 0 {
        const NOBODY: u32 = 65534;
        command.uid(NOBODY).gid(NOBODY);
    }
    command.args(line.split_whitespace()).current_dir(desk.path("")).output().unwrap()
}

#[test]
fn a_folder_that_cannot_be_written_is_an_error_that_names_the_output() {
    let desk = inputs();
    fs::create_dir(desk.path("closed")).unwrap();
    fs::set_permissions(desk.path("closed"), fs::Permissions::from_mode(0o555)).unwrap();
    for line in COMMANDS {
        let line = line.replace("--out out", "--out closed/out").replace("--keep-residue residue", "");
        refused(without_rights(&desk, &line), &line, &["closed/out", "Permission denied"]);
        assert!(tree(&desk.path("closed")).is_empty(), "{line}");
    }
    fs::set_permissions(desk.path("closed"), fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn a_file_that_cannot_be_read_is_an_error_that_names_it() {
    let desk = inputs();
    for line in COMMANDS {
        let input = ["small", "merged", "base", "adapter"].into_iter().find(|name| line.contains(name)).unwrap();
        let file = ["model.safetensors", "adapter_model.safetensors"].map(|file| desk.path(input).join(file));
        let file = file.iter().find(|file| file.exists()).unwrap();
        let rights = fs::metadata(file).unwrap().permissions();
        fs::set_permissions(file, fs::Permissions::from_mode(0o000)).unwrap();
        let named = format!("{input}/{}", file.file_name().unwrap().display());
        refused(without_rights(&desk, line), line, &[&named, "Permission denied"]);
        fs::set_permissions(file, rights).unwrap();
        assert!(!desk.path("out").exists(), "{line}");
    }
}

/// A model that takes a while to be read.
fn large() -> Desk {
    const SIDE: usize = 2048;
    let desk = Desk::new();
    let weights = ["a", "b", "c", "d"].map(|name| format!("{name}.weight"));
    desk.tensors("large.safetensors", &weights.each_ref().map(|name| (name.as_str(), &[SIDE, SIDE][..])));
    desk.adapter("adapter", &["a", "b", "c", "d"].map(|name| (name, [SIDE, SIDE, 2])), &json!({}));
    desk
}

#[test]
fn a_model_that_shrinks_or_changes_while_it_is_read_is_refused() {
    let desk = large();
    let whole = fs::metadata(desk.path("large.safetensors")).unwrap().len();
    for line in [
        "merge --base large.safetensors --adapter adapter --out out",
        "convert large.safetensors --dtype bf16 --out out",
        "quantise large.safetensors --type nf4 --out out",
    ] {
        for length in [1 << 16, whole] {
            let running = Stopped::begun(&desk, line);
            let file = fs::OpenOptions::new().write(true).open(desk.path("large.safetensors")).unwrap();
            file.set_len(length - 1).unwrap();
            file.set_len(length).unwrap();
            refused(running.go_on(), line, &["large.safetensors", "was changed while it was being read"]);
            assert_eq!(desk.names(), ["adapter", "large.safetensors"], "{line}");
            file.set_len(whole).unwrap();
        }
    }
}

#[test]
fn of_two_runs_with_one_output_the_later_one_is_refused_or_replaces_the_whole() {
    let desk = large();
    let convert = |dtype: &str| format!("convert large.safetensors --dtype {dtype} --out out");
    desk.good(&convert("bf16").replace("--out out", "--out bf16"), &[]);
    let running = Stopped::begun(&desk, &convert("f32"));
    desk.good(&convert("bf16"), &[]);
    refused(running.go_on(), "convert", &["out", "exists"]);
    assert!(tree(&desk.path("out")) == tree(&desk.path("bf16")));

    let running = Stopped::begun(&desk, &(convert("bf16") + " --overwrite"));
    desk.good(&(convert("f32") + " --overwrite"), &[]);
    assert!(running.go_on().status.success());
    assert!(tree(&desk.path("out")) == tree(&desk.path("bf16")));
    assert_eq!(desk.names(), ["adapter", "bf16", "large.safetensors", "out"]);
}
