//! Memory of a GPU, which any thread may drop.

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaSlice, DriverError};

/// An allocation of a [`Driver`](super::Driver)'s, on its stream.
///
/// Never empty: the driver refuses allocations of nothing, so those of no bytes have one.
pub struct Memory {
    // The order counts: the slice is dropped first, by a thread that `drop` has bound.
    slice: CudaSlice<u8>,
    earlier: Earlier,
}

impl Memory {
    pub(super) fn new(slice: CudaSlice<u8>) -> Self {
        let earlier = Earlier { context: Arc::clone(slice.context()), error: None };
        Self { slice, earlier }
    }

    /// The slice of cudarc's that it is: bytes on the stream of the backend that made it.
    pub fn slice(&self) -> &CudaSlice<u8> {
        &self.slice
    }

    pub(super) fn slice_mut(&mut self) -> &mut CudaSlice<u8> {
        &mut self.slice
    }
}

impl Drop for Memory {
    /// Makes the context current before the slice is freed, which cudarc does not: a thread that never called CUDA could not free
    /// it, and on one that uses another GPU the default stream would be that one's.
    fn drop(&mut self) {
        let Earlier { context, error } = &mut self.earlier;
        // With an error left to report cudarc neither binds nor waits: it is taken out until the slice is gone.
        *error = context.check_err().err();
        context.record_err(context.bind_to_thread());
    }
}

/// Puts back the error that cudarc had kept for the next call.
struct Earlier {
    context: Arc<CudaContext>,
    error: Option<DriverError>,
}

impl Drop for Earlier {
    fn drop(&mut self) {
        if let Some(error) = self.error {
            self.context.record_err::<()>(Err(error));
        }
    }
}
