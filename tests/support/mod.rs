//! What the tests share: the oracle, inputs, and the one suite that every backend passes.
#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(unreachable_pub, reason = "a test binary exports nothing")]

#[cfg(feature = "adapter")]
pub mod adapters;
pub mod bounds;
#[cfg(feature = "adapter")]
pub mod cases;
pub mod data;
#[cfg(feature = "cuda")]
pub mod emulator;
pub mod oracle;
pub mod suite;
