//! Memory of a GPU: allocations, which any thread may drop, and memory that is lent.

use std::sync::Arc;
use std::thread::ThreadId;

use cudarc::driver::sys::CUdeviceptr;
use cudarc::driver::{CudaSlice, CudaStream};

/// An allocation of a [`Driver`](super::Driver) on its stream, or lent memory of that stream.
///
/// An allocation has at least one byte, since the driver refuses empty ones.
pub struct Memory {
    /// `None`: lent memory.
    slice: Option<CudaSlice<u8>>,
    /// The address of lent memory.
    lent: CUdeviceptr,
    bytes: usize,
    stream: Arc<CudaStream>,
    /// The only thread that can name the stream, if it is a per-thread default stream.
    thread: Option<ThreadId>,
}

impl Memory {
    pub(super) fn new(slice: CudaSlice<u8>, thread: Option<ThreadId>) -> Self {
        let (bytes, stream) = (slice.len(), Arc::clone(slice.stream()));
        Self { slice: Some(slice), lent: 0, bytes, stream, thread }
    }

    /// Lent memory, which is not freed. The caller guarantees that the result is dropped before the memory is freed.
    pub(super) fn lent(address: CUdeviceptr, bytes: usize, stream: &Arc<CudaStream>) -> Self {
        Self { slice: None, lent: address, bytes, stream: Arc::clone(stream), thread: None }
    }

    /// The allocation as a slice of cudarc's, on the stream of the backend that made it. `None`: lent memory.
    pub fn slice(&self) -> Option<&CudaSlice<u8>> {
        self.slice.as_ref()
    }

    /// The allocation as a slice that can be written. `None`: lent memory.
    pub(super) fn slice_mut(&mut self) -> Option<&mut CudaSlice<u8>> {
        self.slice.as_mut()
    }

    /// Hands over the allocation, for the caller to free. `None`: lent memory, or the stream belongs to another thread.
    pub(super) fn into_slice(mut self) -> Option<CudaSlice<u8>> {
        if self.is_elsewhere() { None } else { self.slice.take() }
    }

    /// True if the stream is a per-thread default stream of another thread.
    fn is_elsewhere(&self) -> bool {
        self.thread.is_some_and(|thread| thread != std::thread::current().id())
    }

    /// The address of lent memory. 0 for an allocation, whose address cudarc gives out with a record of its use.
    pub(super) fn lent_address(&self) -> CUdeviceptr {
        self.lent
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }
}

impl Drop for Memory {
    /// Makes the context current before the slice is freed, which cudarc does not: otherwise a thread that never called CUDA
    /// could not free it, and on a thread that uses another GPU the default stream would be that GPU's.
    ///
    /// With a per-thread default stream, any other thread first waits for all work of the GPU; if that fails, the memory is
    /// leaked rather than freed too early.
    fn drop(&mut self) {
        let elsewhere = self.is_elsewhere();
        let Some(slice) = self.slice.take() else { return };
        let context = self.stream.context();
        // With a pending error, cudarc would neither bind nor wait: the error is set aside until the slice is freed.
        let earlier = context.check_err().err();
        context.record_err(context.bind_to_thread());
        match if elsewhere { context.synchronize() } else { Ok(()) } {
            Ok(()) => drop(slice),
            Err(error) => {
                context.record_err::<()>(Err(error));
                std::mem::forget(slice);
            }
        }
        if let Some(error) = earlier {
            context.record_err::<()>(Err(error));
        }
    }
}
