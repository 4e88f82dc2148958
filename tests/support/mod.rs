//! Shared by the tests: the oracle, inputs, and the suite that every backend passes.
#![allow(dead_code, unused_imports, reason = "each test binary uses a part")]
#![allow(unreachable_pub, reason = "a test binary exports nothing")]

#[cfg(feature = "adapter")]
pub mod adapters;
pub mod bounds;
#[cfg(feature = "adapter")]
pub mod cases;
#[cfg(feature = "cuda")]
pub mod counting;
pub mod data;
pub mod devices;
#[cfg(feature = "cuda")]
pub mod emulator;
#[cfg(feature = "cuda")]
pub mod mutants;
pub mod oracle;
pub mod passes;
pub mod suite;

/// True if `LOWRANK_REQUIRE`, a comma-separated list, contains this backend; the tests then fail if it is unavailable.
pub fn is_required(backend: &str) -> bool {
    std::env::var("LOWRANK_REQUIRE").is_ok_and(|names| names.split(',').any(|name| name == backend))
}
