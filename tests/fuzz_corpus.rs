//! The targets of fuzzing on stable Rust: on the files in `fuzz/corpus`, each of which reaches other code of a reader, and on
//! changed ones. `scripts/fuzz` has libFuzzer look for more.

#[path = "../fuzz/src/lib.rs"]
mod targets;

use std::panic::catch_unwind;
use std::path::Path;

use lowrank::random::Rng;

/// Numbers that readers should doubt.
const NUMBERS: [&str; 8] = ["0", "-1", "1", "255", "4294967296", "9223372036854775808", "18446744073709551615", "1e308"];

/// The files of a target, by name.
fn files(target: &str) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let names = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut files: Vec<_> = names.map(|name| (name.clone(), std::fs::read(folder.join(name)).unwrap())).collect();
    files.sort();
    files
}

/// Bytes with one change: a bit, a byte, a number, a length, a piece that is missing, doubled or another file's, or the end.
fn change(bytes: &mut Vec<u8>, other: &[u8], rng: &mut Rng) {
    let len = bytes.len();
    let at = rng.below(len + 1);
    let end = at + rng.below((len - at).min(64) + 1);
    match rng.below(9) {
        0 if at < len => bytes[at] ^= 1 << rng.below(8),
        1 if at < len => bytes[at] = rng.word() as u8,
        2 => bytes.insert(at, rng.word() as u8),
        3 => drop(bytes.drain(at..end)),
        4 => {
            let piece = bytes[at..end].to_vec();
            bytes.splice(at..at, piece);
        }
        5 => bytes.truncate(at),
        6 => {
            let piece = rng.below(other.len() + 1);
            bytes.splice(at..end, other[piece..].iter().copied().take(64));
        }
        7 => {
            let digit = bytes[at..].iter().position(u8::is_ascii_digit).map_or(at, |digit| at + digit);
            let digits = bytes[digit..].iter().take_while(|byte| byte.is_ascii_digit()).count();
            bytes.splice(digit..digit + digits, NUMBERS[rng.below(NUMBERS.len())].bytes());
        }
        _ if len >= 8 => {
            let at = if rng.below(2) == 0 { 0 } else { at.min(len - 8) };
            let number = [0, 1, 8, len as u64, u64::MAX, 1 << rng.below(64)][rng.below(6)];
            bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
        }
        _ => {}
    }
}

/// Calls a target. If it panics, the bytes are kept, and the panic goes on.
fn call(name: &str, target: targets::Target, bytes: &[u8]) {
    if let Err(panic) = catch_unwind(|| target(bytes)) {
        let path = std::env::temp_dir().join(format!("lowrank-fuzz-{name}"));
        std::fs::write(&path, bytes).unwrap();
        println!("{name}: the bytes are in {}", path.display());
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn every_file_of_the_corpus_keeps_the_promises() {
    for (name, target) in targets::TARGETS {
        let files = files(name);
        assert!(!files.is_empty(), "there are no files for {name}");
        for (file, bytes) in &files {
            println!("{name}/{file}"); // shown if it panics
            call(name, target, bytes);
        }
    }
}

/// `LOWRANK_FUZZ_RUNS=N`: N changed files a target.
#[test]
fn changed_files_keep_the_promises() {
    let runs = std::env::var("LOWRANK_FUZZ_RUNS").map_or(300, |runs| runs.parse().unwrap());
    for (name, target) in targets::TARGETS {
        let (files, mut rng) = (files(name), Rng::new(runs as u64));
        for _ in 0..runs {
            let [one, other] = [0; 2].map(|_| &files[rng.below(files.len())].1);
            let mut bytes = one.clone();
            for _ in 0..=rng.below(4) {
                change(&mut bytes, other, &mut rng);
            }
            call(name, target, &bytes);
        }
        println!("{name}: {runs} changed files");
    }
}
