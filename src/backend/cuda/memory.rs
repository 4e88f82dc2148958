//! Memory of a GPU, which any thread may drop, or which somebody lends.

use std::sync::Arc;
use std::thread::ThreadId;

use cudarc::driver::sys::CUdeviceptr;
use cudarc::driver::{CudaSlice, CudaStream};

/// An allocation of a [`Driver`](super::Driver)'s, on its stream, or memory of that stream that somebody lends.
///
/// An allocation is never empty: the driver refuses allocations of nothing, so those of no bytes have one.
pub struct Memory {
    /// None: memory that is lent.
    slice: Option<CudaSlice<u8>>,
    /// Where memory that is lent lies.
    lent: CUdeviceptr,
    bytes: usize,
    stream: Arc<CudaStream>,
    /// The only thread that can name the stream, if it is each thread's own.
    thread: Option<ThreadId>,
}

impl Memory {
    pub(super) fn new(slice: CudaSlice<u8>, thread: Option<ThreadId>) -> Self {
        let (bytes, stream) = (slice.len(), Arc::clone(slice.stream()));
        Self { slice: Some(slice), lent: 0, bytes, stream, thread }
    }

    /// Memory of somebody else's, which is not freed. Whoever makes it sees to it that it is gone before that memory is.
    pub(super) fn lent(address: CUdeviceptr, bytes: usize, stream: &Arc<CudaStream>) -> Self {
        Self { slice: None, lent: address, bytes, stream: Arc::clone(stream), thread: None }
    }

    /// The slice of cudarc's that it is: bytes on the stream of the backend that made it. None: memory that is lent.
    pub fn slice(&self) -> Option<&CudaSlice<u8>> {
        self.slice.as_ref()
    }

    /// The same, to be written.
    pub(super) fn slice_mut(&mut self) -> Option<&mut CudaSlice<u8>> {
        self.slice.as_mut()
    }

    /// The slice, for the caller to free. None: memory that is lent, or whose stream this thread cannot name.
    pub(super) fn into_slice(mut self) -> Option<CudaSlice<u8>> {
        if self.is_elsewhere() { None } else { self.slice.take() }
    }

    /// Whether the stream is each thread's own and this is not the thread that it belongs to.
    fn is_elsewhere(&self) -> bool {
        self.thread.is_some_and(|thread| thread != std::thread::current().id())
    }

    /// Where memory that is lent lies; 0: an allocation, of which cudarc says where, when it is told for what.
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
    /// Makes the context current before the slice is freed, which cudarc does not: a thread that never called CUDA could not free
    /// it, and on one that uses another GPU the default stream would be that one's.
    ///
    /// Where each thread has a stream of its own, another thread than the one that used the memory waits for all of them first; if
    /// that fails, the memory is lost rather than freed too early.
    fn drop(&mut self) {
        let elsewhere = self.is_elsewhere();
        let Some(slice) = self.slice.take() else { return };
        let context = self.stream.context();
        // With an error left to report cudarc neither binds nor waits: it is taken out until the slice is gone.
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
