//! NVIDIA GPUs, connected by NCCL.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use cudarc::driver::{CudaStream, DriverError};
use cudarc::nccl::result::NcclError;
use cudarc::nccl::safe::{Comm, Id, ReduceOp};

use super::{Communicator, check_root};
use crate::backend::Backend;
use crate::backend::cuda::{Cuda, nccl_is_installed};
use crate::element::{Float, bf16, f16};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

const NAME: &str = "nccl";

/// The identity of a group of GPUs. Rank 0 makes one and sends its [bytes](Self::to_bytes) to the others, over MPI or a file.
#[derive(Clone, Copy)]
pub struct NcclId([u8; 128]);

impl NcclId {
    /// A new group. Errors: [`Error::Unavailable`] without NCCL's library; [`Error::Device`].
    pub fn new() -> Result<Self> {
        installed()?;
        let id = Id::new().map_err(|error| failed("make an id", error))?;
        Ok(Self(id.internal().map(|byte| byte as u8)))
    }

    /// The identity in bytes, for the other ranks.
    pub fn to_bytes(self) -> [u8; 128] {
        self.0
    }

    /// From the bytes that rank 0 sent.
    pub fn from_bytes(bytes: [u8; 128]) -> Self {
        Self(bytes)
    }
}

impl fmt::Debug for NcclId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NcclId({:02x}{:02x}…)", self.0[0], self.0[1])
    }
}

/// A rank of NCCL: one GPU. Gradients of a [`Cuda`] backend on the same stream are summed in the GPU's memory; memory of the
/// host is copied to the GPU and back.
pub struct Nccl {
    comm: Comm,
    stream: Arc<CudaStream>,
}

impl Nccl {
    /// Joins the group `id` as `rank` of `size`, on the stream of `gpu`; waits until all ranks have joined. Each rank has a GPU of
    /// its own.
    ///
    /// Errors: [`Error::Unavailable`] without NCCL's library; [`Error::Value`] unless `rank` is below `size`; [`Error::Device`].
    pub fn new<E: Float>(gpu: &Cuda<E>, rank: usize, size: usize, id: NcclId) -> Result<Self> {
        installed()?;
        Error::unless(rank < size && i32::try_from(size).is_ok(), NAME, "rank", rank, "below the number of ranks")?;
        let stream = Arc::clone(gpu.on_device().stream());
        stream.context().bind_to_thread().map_err(device)?;
        let id = Id::uninit(id.0.map(|byte| byte as std::ffi::c_char));
        let comm = Comm::from_rank(Arc::clone(&stream), rank, size, id).map_err(|error| failed("join", error))?;
        Ok(Self { comm, stream })
    }

    /// All-reduce in the memory of the GPU, if the backend is CUDA's with this element type.
    fn sum_on_device<E: Float>(&self, backend: &dyn Any, values: Box<dyn Any>) -> Result<OnDevice> {
        let Some(gpu) = backend.downcast_ref::<Cuda<E>>() else { return Ok(OnDevice::Elsewhere(values)) };
        if !Arc::ptr_eq(gpu.on_device().stream(), &self.stream) {
            return Err(Error::Device { backend: NAME, reason: "the tensor belongs to another stream".into() });
        }
        let values = values.downcast::<Tensor<Cuda<E>, f32>>().map_err(|_| unknown())?;
        let shape = values.shape();
        let mut slice = values.into_cuda_slice()?;
        self.comm.all_reduce_in_place(&mut slice, &ReduceOp::Sum).map_err(|error| failed("all_reduce", error))?;
        Ok(OnDevice::Summed(Box::new(Tensor::from_cuda_slice(gpu, shape, slice)?)))
    }
}

impl fmt::Debug for Nccl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Nccl(rank {} of {})", self.comm.rank(), self.comm.world_size())
    }
}

impl Communicator for Nccl {
    fn rank(&self) -> usize {
        self.comm.rank()
    }

    fn size(&self) -> usize {
        self.comm.world_size()
    }

    fn all_reduce(&self, values: &mut [f32]) -> Result<()> {
        if values.is_empty() {
            return Ok(());
        }
        let mut slice = self.stream.clone_htod(&*values).map_err(device)?;
        self.comm.all_reduce_in_place(&mut slice, &ReduceOp::Sum).map_err(|error| failed("all_reduce", error))?;
        self.stream.memcpy_dtoh(&slice, values).map_err(device)?;
        self.stream.synchronize().map_err(device)
    }

    fn broadcast(&self, bytes: &mut [u8], root: usize) -> Result<()> {
        check_root(root, self.size())?;
        if bytes.is_empty() {
            return Ok(());
        }
        let mut slice = self.stream.clone_htod(&*bytes).map_err(device)?;
        self.comm.broadcast_in_place(&mut slice, root as i32).map_err(|error| failed("broadcast", error))?;
        self.stream.memcpy_dtoh(&slice, bytes).map_err(device)?;
        self.stream.synchronize().map_err(device)
    }

    fn barrier(&self) -> Result<()> {
        self.all_reduce(&mut [0.0])
    }

    fn all_reduce_tensor<B: Backend>(&self, backend: &B, values: Tensor<B, f32>) -> Result<Tensor<B, f32>> {
        // NCCL knows only the memory of CUDA's backend, and this method is generic in the backend.
        let mut values: Box<dyn Any> = Box::new(values);
        for sum in [Self::sum_on_device::<f32>, Self::sum_on_device::<f16>, Self::sum_on_device::<bf16>] {
            match sum(self, backend, values)? {
                OnDevice::Summed(values) => return values.downcast().map(|values| *values).map_err(|_| unknown()),
                OnDevice::Elsewhere(same) => values = same,
            }
        }
        let mut values = *values.downcast::<Tensor<B, f32>>().map_err(|_| unknown())?;
        let mut host = values.to_vec(backend)?;
        self.all_reduce(&mut host)?;
        values.copy_from_slice(backend, &host)?;
        Ok(values)
    }
}

/// A tensor after the attempt to sum it in the memory of the GPU.
enum OnDevice {
    Summed(Box<dyn Any>),
    /// Unchanged: of another backend.
    Elsewhere(Box<dyn Any>),
}

/// Errors: [`Error::Unavailable`] without NCCL's library.
fn installed() -> Result<()> {
    nccl_is_installed().map_err(|reason| Error::Unavailable { backend: NAME, reason })
}

fn failed(what: &str, error: NcclError) -> Error {
    Error::Device { backend: NAME, reason: format!("{what}: {:?}", error.0) }
}

fn device(error: DriverError) -> Error {
    Error::Device { backend: NAME, reason: format!("{:?}", error.0) }
}

fn unknown() -> Error {
    Error::Device { backend: NAME, reason: "the tensor is not one of its backend".into() }
}
