//! Any bytes are images, labels or an error; what is read is as long as it says, and was in the file.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use lowrank::mnist::{Images, Labels};

/// Deflate makes at most this many bytes of one.
const DEFLATE: usize = 1032;

fuzz_target!(|bytes: &[u8]| {
    let path = Path::new("fuzz");
    if let Ok(images) = Images::from_idx(path, bytes) {
        assert!(images.len() * images.rows() * images.cols() <= bytes.len() * DEFLATE);
        assert!(images.get(images.len() - 1).is_some() && images.get(images.len()).is_none());
    }
    if let Ok(labels) = Labels::from_idx(path, bytes) {
        assert!(labels.as_slice().iter().all(|&label| label < 10));
        assert!(labels.as_slice().len() <= bytes.len() * DEFLATE);
    }
});
