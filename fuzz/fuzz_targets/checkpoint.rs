//! Any bytes are a checkpoint or an error; what is read lies within the file, and is written again whole or not at all.
#![no_main]

use std::ops::ControlFlow;

use libfuzzer_sys::fuzz_target;
use lowrank::checkpoint::{Checkpoint, convert};
use lowrank::{DType, Error};

fuzz_target!(|bytes: &[u8]| {
    let path = |what: &str| std::env::temp_dir().join(format!("lowrank-fuzz-{}-{what}.safetensors", std::process::id()));
    let (base, out) = (path("base"), path("out"));
    std::fs::write(&base, bytes).expect("a folder for temporary files");
    if let Ok(checkpoint) = Checkpoint::open(&base) {
        assert!(checkpoint.entries().all(|entry| entry.start + entry.bytes as u64 <= bytes.len() as u64));
        let written = convert(&checkpoint, DType::BF16, &out, &mut |_| ControlFlow::Continue(()));
        assert!(written.is_ok() || matches!(written, Err(Error::File { .. })));
        assert_eq!(written.is_ok(), out.exists());
        std::fs::remove_file(&out).ok();
    }
});
