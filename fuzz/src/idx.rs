//! The IDX reader of `examples/mnist_lora`.

#[allow(dead_code, unreachable_pub, reason = "the readers of an example, of which this uses a part")]
#[path = "../../examples/mnist_lora/mnist/mod.rs"]
mod mnist;

use std::path::Path;

use mnist::{Images, Labels};

/// The largest number of bytes that deflate can expand one byte to.
const DEFLATE: usize = 1032;

/// Any bytes are images, labels or an error, and never more data than the file holds.
pub fn idx(bytes: &[u8]) {
    let path = Path::new("fuzz");
    if let Ok(images) = Images::from_idx(path, bytes) {
        assert!(images.len() * images.rows() * images.cols() <= bytes.len() * DEFLATE);
        assert!(images.get(images.len() - 1).is_some() && images.get(images.len()).is_none());
    }
    if let Ok(labels) = Labels::from_idx(path, bytes) {
        assert!(labels.as_slice().iter().all(|&label| label < 10));
        assert!(labels.as_slice().len() <= bytes.len() * DEFLATE);
    }
}
