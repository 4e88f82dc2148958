//! Memory of a GPU, which any thread may drop, or which somebody lends.

use std::sync::Arc;
use std::thread::ThreadId;

use cudarc::driver::sys::CUdeviceptr;
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DriverError};

/// An allocation of a [`Driver`](super::Driver)'s, on its stream, or memory of that stream that somebody lends.
///
/// An allocation is never empty: the driver refuses allocations of nothing, so those of no bytes have one.
pub struct Memory(Kind);

enum Kind {
    Owned(Owned),
    Lent { address: CUdeviceptr, bytes: usize, stream: Arc<CudaStream> },
}

impl Memory {
    /// `thread`: the only one that can name the stream, if it is each thread's own.
    pub(super) fn new(slice: CudaSlice<u8>, thread: Option<ThreadId>) -> Self {
        let earlier = Earlier { context: Arc::clone(slice.context()), error: None };
        Self(Kind::Owned(Owned { slice, earlier, thread }))
    }

    /// Memory of somebody else's, which is not freed. Whoever makes it sees to it that it is gone before that memory is.
    pub(super) fn lent(address: CUdeviceptr, bytes: usize, stream: &Arc<CudaStream>) -> Self {
        Self(Kind::Lent { address, bytes, stream: Arc::clone(stream) })
    }

    /// The slice of cudarc's that it is: bytes on the stream of the backend that made it. None: memory that is lent.
    pub fn slice(&self) -> Option<&CudaSlice<u8>> {
        match &self.0 {
            Kind::Owned(owned) => Some(&owned.slice),
            Kind::Lent { .. } => None,
        }
    }

    /// The same, to be written; `Err` has the address of memory that is lent.
    pub(super) fn slice_mut(&mut self) -> Result<&mut CudaSlice<u8>, CUdeviceptr> {
        match &mut self.0 {
            Kind::Owned(owned) => Ok(&mut owned.slice),
            Kind::Lent { address, .. } => Err(*address),
        }
    }

    /// Where memory that is lent lies; None: an allocation, which cudarc hands out.
    pub(super) fn lent_address(&self) -> Option<CUdeviceptr> {
        match self.0 {
            Kind::Owned(_) => None,
            Kind::Lent { address, .. } => Some(address),
        }
    }

    pub(super) fn bytes(&self) -> usize {
        match &self.0 {
            Kind::Owned(owned) => owned.slice.len(),
            Kind::Lent { bytes, .. } => *bytes,
        }
    }

    pub(super) fn stream(&self) -> &Arc<CudaStream> {
        match &self.0 {
            Kind::Owned(owned) => owned.slice.stream(),
            Kind::Lent { stream, .. } => stream,
        }
    }
}

struct Owned {
    // The order counts: the slice is dropped first, by a thread that `drop` has bound.
    slice: CudaSlice<u8>,
    earlier: Earlier,
    thread: Option<ThreadId>,
}

impl Drop for Owned {
    /// Makes the context current before the slice is freed, which cudarc does not: a thread that never called CUDA could not free
    /// it, and on one that uses another GPU the default stream would be that one's.
    ///
    /// Where each thread has a stream of its own, another thread than the one that used the memory waits for all of them first.
    fn drop(&mut self) {
        let elsewhere = self.thread.is_some_and(|thread| thread != std::thread::current().id());
        let Earlier { context, error } = &mut self.earlier;
        // With an error left to report cudarc neither binds nor waits: it is taken out until the slice is gone.
        *error = context.check_err().err();
        context.record_err(context.bind_to_thread());
        if elsewhere {
            context.record_err(context.synchronize());
        }
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
