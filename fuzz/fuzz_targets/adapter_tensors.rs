//! Any bytes are tensors or an error; what is read fits into its own shape and is no larger than the file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lowrank::adapter::parse_tensors;

fuzz_target!(|bytes: &[u8]| {
    let Ok(tensors) = parse_tensors(bytes) else { return };
    for (name, tensor) in &tensors {
        assert_eq!(tensor.values.len(), tensor.shape.iter().product::<usize>(), "{name}");
    }
    let elements: usize = tensors.values().map(|tensor| tensor.values.len()).sum();
    assert!(2 * elements <= bytes.len());
});
