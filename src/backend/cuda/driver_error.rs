//! The driver's errors as errors of this crate.

use cudarc::driver::DriverError;
use cudarc::driver::sys::CUresult;

use super::NAME;
use crate::error::Error;

/// The text of the driver and its name for the error.
pub(super) fn describe(error: DriverError) -> String {
    match error.error_string() {
        Ok(text) => format!("{} ({:?})", text.to_string_lossy(), error.0),
        Err(_) => format!("{:?}", error.0),
    }
}

/// The error of a call of the driver, named `what`.
pub(super) fn failed(what: &str, error: DriverError) -> Error {
    match error.0 {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => Error::OutOfMemory { backend: NAME, bytes: 0 },
        _ => Error::Device { backend: NAME, reason: format!("{what}: {}", describe(error)) },
    }
}

/// The error of an allocation of `bytes` bytes.
pub(super) fn allocation_error(bytes: usize, error: DriverError) -> Error {
    match failed("allocate", error) {
        Error::OutOfMemory { backend, .. } => Error::OutOfMemory { backend, bytes },
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn out_of_memory_is_an_error_of_its_own() {
        let error = DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY);
        assert_eq!(allocation_error(12, error).to_string(), "cuda: out of memory, allocating 12 bytes");
        assert_eq!(failed("lora_merge", error).to_string(), "cuda: out of memory, allocating data of the driver itself");
    }
}
