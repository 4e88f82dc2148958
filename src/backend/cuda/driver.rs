//! One GPU through NVIDIA's driver. The unsafe code of this backend is here and in `newer.rs`.
#![allow(unsafe_code, reason = "loading the driver, and launches: the compiler cannot see what a kernel does")]

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::Arc;
use std::thread::ThreadId;

use bytemuck::Pod;
use cudarc::driver::sys::cuModuleLoadDataEx;
use cudarc::driver::sys::{self, CUdevice_attribute, CUfunction_attribute, CUjit_option, CUmemPool_attribute, CUresult};
use cudarc::driver::{CudaContext, CudaFunction, CudaModule, CudaSlice, CudaStream, CudaView, CudaViewMut, DriverError, result};
use cudarc::driver::{DevicePtr, DevicePtrMut, DeviceSlice, SyncOnDrop};
use cudarc::nvrtc::Ptx;

use super::device::{Arg, Device, Gpu, Launch, Tiles};
use super::driver_error::{allocation_error, describe, failed};
use super::kernel::Kernel;
use super::lend::{Lent, LentMut};
use super::memory::Memory;
use super::newer::{OverlappingLaunch, TensorMap, TensorMapEncoder, library};
use super::plan::Plan;
use super::{NAME, from_hopper_on, hopper_ptx, ptx};
use crate::element::{DType, Element};
use crate::error::{Error, Result};

/// Bytes of shared memory that a block can opt in to on Hopper.
const MAX_SHARED_BYTES: i32 = 227 << 10;
/// The first driver version that supports overlapping launches in graphs: CUDA 12.3.
const OVERLAP_IN_GRAPHS_VERSION: i32 = 12030;

/// The first driver version that loads the PTX of Hopper's kernels (PTX 8.0) and encodes tensor maps: CUDA 12.0.
const HOPPER_PTX_VERSION: i32 = 12000;

/// The driver's handle of the per-thread default stream, `CU_STREAM_PER_THREAD`.
const PER_THREAD: sys::CUstream = std::ptr::without_provenance_mut(2);

/// A stream of a GPU, with the kernels of one element type loaded.
///
/// Code outside this crate cannot make one, nor a [`Launch`] for it: every launch is made by a verb from a checked request, and
/// names memory that a driver allocated.
pub struct Driver {
    stream: Arc<CudaStream>,
    /// The only thread that can name the stream, if it is a per-thread default stream.
    thread: Option<ThreadId>,
    kernels: HashMap<Kernel, CudaFunction>,
    gpu: Gpu,
    /// Launches with overlap, where the driver and the GPU support it.
    overlapping: Option<OverlappingLaunch>,
    /// The driver's encoder of tensor maps.
    maps: Option<TensorMapEncoder>,
}

impl Driver {
    /// The stream of all launches.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Opens the GPU with this number, on its default stream.
    pub(super) fn open(ordinal: usize, dtype: DType) -> Result<Self> {
        let unavailable = |reason: String| Error::Unavailable { backend: NAME, reason };
        library().map_err(|reason| unavailable(reason.to_owned()))?; // cudarc panics at its first call if there is none
        let count = CudaContext::device_count().map_err(|error| unavailable(describe(error)))?;
        if ordinal >= count as usize {
            return Err(unavailable(format!("there is no GPU {ordinal}; the driver sees {count}")));
        }
        let context = CudaContext::new(ordinal).map_err(|error| unavailable(describe(error)))?;
        if context.has_async_alloc() {
            retain_freed_memory(&context).map_err(|error| failed("memory pool", error))?;
        }
        Self::from_stream(context.default_stream(), dtype)
    }

    /// Uses a stream of the caller's.
    pub(super) fn from_stream(stream: Arc<CudaStream>, dtype: DType) -> Result<Self> {
        let thread = (stream.cu_stream() == PER_THREAD).then(|| std::thread::current().id());
        let version = version()?;
        let (gpu, from_hopper) = gpu(stream.context(), version)?;
        let overlapping = OverlappingLaunch::find().filter(|_| from_hopper && version >= OVERLAP_IN_GRAPHS_VERSION);
        let ptx = if from_hopper { from_hopper_on(ptx(dtype)) } else { ptx(dtype).to_owned() };
        let module = load(stream.context(), &ptx)?;
        let mut kernels: HashMap<_, _> = kernels(false).map(|kernel| function(&module, kernel, dtype)).collect::<Result<_>>()?;
        if let (Some(ptx), (9, 0)) = (hopper_ptx(dtype), gpu.capability) {
            kernels.extend(load_hopper_kernels(stream.context(), ptx, dtype)?);
        }
        Ok(Self { kernels, gpu, overlapping, maps: TensorMapEncoder::find(), stream, thread })
    }
}

/// The properties for plans, and true if the GPU is Hopper or later. Errors: [`Error::Unavailable`] if it is too old for the
/// kernels.
fn gpu(context: &CudaContext, version: i32) -> Result<(Gpu, bool)> {
    let (major, minor) = context.compute_capability().map_err(|error| failed("compute capability", error))?;
    if major < 8 {
        let reason = format!("the GPU has compute capability {major}.{minor}; the kernels need 8.0");
        return Err(Error::Unavailable { backend: NAME, reason });
    }
    let multiprocessors = context.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
    let multiprocessors = multiprocessors.map_err(|error| failed("multiprocessors", error))? as u32;
    let capability = (major as u32, minor as u32);
    Ok((Gpu { capability: loadable(capability, version), multiprocessors }, capability >= (9, 0)))
}

/// The compute capability whose kernels a driver of this version can load: (8, 9) for a Hopper GPU with a driver too old for
/// Hopper's kernels.
fn loadable(capability: (u32, u32), version: i32) -> (u32, u32) {
    if capability == (9, 0) && version < HOPPER_PTX_VERSION { (8, 9) } else { capability }
}

/// Loads the kernels for Hopper only.
fn load_hopper_kernels(context: &Arc<CudaContext>, ptx: &str, dtype: DType) -> Result<Vec<(Kernel, CudaFunction)>> {
    let module = load(context, ptx)?;
    let most = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    let load_one = |kernel| {
        let (kernel, function) = function(&module, kernel, dtype)?;
        function.set_attribute(most, MAX_SHARED_BYTES).map_err(|error| failed(kernel.name(), error))?;
        Ok((kernel, function))
    };
    kernels(true).map(load_one).collect()
}

impl Device for Driver {
    type Memory = Memory;

    fn name(&self) -> String {
        self.stream.context().name().unwrap_or_else(describe)
    }

    fn gpu(&self) -> Gpu {
        self.gpu
    }

    fn alloc(&self, bytes: usize) -> Result<Memory> {
        self.check_thread()?;
        // SAFETY: bytes need no initial value; every kernel writes its outputs before another kernel reads them.
        let slice = unsafe { self.stream.alloc(bytes.max(1)) };
        slice.map(|slice| Memory::new(slice, self.thread)).map_err(|error| allocation_error(bytes, error))
    }

    fn zeros(&self, bytes: usize) -> Result<Memory> {
        self.check_thread()?;
        let slice = self.stream.alloc_zeros(bytes.max(1));
        slice.map(|slice| Memory::new(slice, self.thread)).map_err(|error| allocation_error(bytes, error))
    }

    fn write(&self, memory: &mut Memory, host: &[u8]) -> Result<()> {
        if host.is_empty() {
            return Ok(());
        }
        self.check_copy("copy to the GPU", memory)?;
        let slice = memory.slice_mut().ok_or_else(|| lent_memory_error("copy to the GPU"))?;
        let copied = self.stream.memcpy_htod(host, slice);
        // Wait until the driver has read `host`: it may copy pinned memory later.
        copied.and_then(|()| self.stream.synchronize()).map_err(|error| failed("copy to the GPU", error))
    }

    fn read(&self, memory: &Memory, host: &mut [u8]) -> Result<()> {
        if host.is_empty() {
            return self.synchronize();
        }
        self.check_copy("copy from the GPU", memory)?;
        let slice = memory.slice().ok_or_else(|| lent_memory_error("copy from the GPU"))?;
        let copied = self.stream.memcpy_dtoh(&slice.slice(..host.len()), host);
        copied.and_then(|()| self.stream.synchronize()).map_err(|error| failed("copy from the GPU", error))
    }

    fn bytes(memory: &Memory) -> usize {
        memory.bytes()
    }

    /// An allocation starts at a multiple of 256 bytes, so 0 has its alignment.
    fn address(memory: &Memory) -> u64 {
        memory.lent_address()
    }

    fn launch(&self, launch: Launch<'_, Self>) -> Result<()> {
        let (plan, overlapping) = (launch.plan(), self.overlapping.filter(|_| launch.overlaps()));
        let mut args = launch.into_args();
        self.check_stream(plan.kernel.name(), args.iter().filter_map(memory_of))?;
        self.bind()?; // tensor maps are encoded for the current context
        let mut operands: Vec<_> = args.iter_mut().map(|arg| self.operand(arg)).collect::<Result<_>>()?;
        let mut params: Vec<_> = operands.iter_mut().map(|operand| operand.value.address()).collect();
        let started = self.start(plan, overlapping, &mut params);
        started.map_err(|error| failed(plan.kernel.name(), error))
    }

    fn synchronize(&self) -> Result<()> {
        self.check_thread()?;
        self.stream.synchronize().map_err(|error| failed("synchronize", error))
    }
}

impl Driver {
    /// Lends memory to be read. Until the loan ends, cudarc treats it as in use by a kernel that reads it.
    pub(super) fn lend<'a, T: Element>(&'a self, view: &'a CudaView<'_, T>) -> Result<Lent<'a, T>> {
        self.check_lendable("view", view)?;
        let (address, used) = view.device_ptr(&self.stream);
        let memory = Memory::lent(aligned::<T>(address)?, view.num_bytes(), &self.stream);
        Ok(Lent::new(memory, view.len(), used))
    }

    /// Lends memory to be written.
    pub(super) fn lend_mut<'a, T: Element>(&'a self, view: &'a mut CudaViewMut<'_, T>) -> Result<LentMut<'a, T>> {
        self.check_lendable("view", view)?;
        let (len, bytes) = (view.len(), view.num_bytes());
        let (address, used) = view.device_ptr_mut(&self.stream);
        let memory = Memory::lent(aligned::<T>(address)?, bytes, &self.stream);
        Ok(LentMut::new(memory, len, used))
    }

    /// Adopts a slice of the caller's, which is then freed like an allocation.
    pub(super) fn adopt<T: Element>(&self, slice: CudaSlice<T>) -> Result<Memory> {
        self.check_lendable("slice", &slice)?;
        let bytes = slice.num_bytes();
        Ok(Memory::new(as_elements(slice, bytes), self.thread))
    }

    /// `Err` unless a view belongs to this stream.
    fn check_lendable<T>(&self, name: &'static str, view: &impl DeviceSlice<T>) -> Result<()> {
        self.check_thread()?;
        let (here, there) = (&self.stream, view.stream());
        let same = (here.context().cu_ctx(), here.cu_stream()) == (there.context().cu_ctx(), there.cu_stream());
        let got = format!("memory of another stream, on GPU {}", there.context().ordinal());
        Error::unless(same, "lend", name, got, "memory of this backend's stream")
    }

    /// `Err` if the stream is the per-thread default stream of another thread, since its handle would mean another stream here.
    fn check_thread(&self) -> Result<()> {
        if self.thread.is_none_or(|thread| thread == std::thread::current().id()) {
            return Ok(());
        }
        let reason = "the backend uses the per-thread default stream of another thread; make a backend on this thread, \
                      or from a stream that all threads share";
        Err(Error::Device { backend: NAME, reason: reason.into() })
    }

    /// Makes the context current on this thread. Errors: also those that cudarc recorded earlier.
    fn bind(&self) -> Result<()> {
        self.stream.context().bind_to_thread().map_err(|error| failed("context", error))
    }

    /// `Err` unless the memory belongs to this stream and the stream is not being captured: a copy would become part of the
    /// graph, and use the host's memory at each launch, when it may be gone.
    fn check_copy(&self, what: &str, memory: &Memory) -> Result<()> {
        self.check_stream(what, [memory])?;
        let status = self.stream.capture_status().map_err(|error| failed(what, error))?;
        if status == sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE {
            return Ok(());
        }
        let reason = format!("{what}: the stream is being captured in a graph, which would repeat the copy at each launch");
        Err(Error::Device { backend: NAME, reason })
    }

    /// `Err` unless every operand belongs to this stream.
    ///
    /// On another GPU, the address would be meaningless; on another stream of this GPU, nothing orders writing and freeing:
    /// cudarc's events do not, since a slice remembers only the last stream that read it.
    fn check_stream<'m>(&self, what: &str, operands: impl IntoIterator<Item = &'m Memory>) -> Result<()> {
        self.check_thread()?;
        let here = (self.stream.context().cu_ctx(), self.stream.cu_stream());
        let place = |stream: &CudaStream| (stream.context().cu_ctx(), stream.cu_stream());
        let mut streams = operands.into_iter().map(|memory| memory.stream());
        let Some(other) = streams.find(|stream| place(stream) != here) else { return Ok(()) };
        let [there, ordinal] = [other, &self.stream].map(|stream| stream.context().ordinal());
        let reason = match there == ordinal {
            false => format!("{what}: a tensor is on GPU {there}, not on GPU {ordinal}"),
            true => format!("{what}: a tensor belongs to another stream of GPU {ordinal}; use one backend, or copy it"),
        };
        Err(Error::Device { backend: NAME, reason })
    }
}

/// The memory of an argument.
fn memory_of<'m>(arg: &'m Arg<'_, Memory>) -> Option<&'m Memory> {
    match arg {
        Arg::Read(memory, _) | Arg::ReadTiles(memory, _) => Some(memory),
        Arg::Write(memory, _) | Arg::WriteTiles(memory, _) => Some(memory),
        Arg::U32(_) | Arg::U64(_) | Arg::F32(_) | Arg::Null => None,
    }
}

/// The value of an argument, and cudarc's guard, which records the use of its memory when it is dropped, after the launch.
struct Operand<'s> {
    value: Value,
    _used: Option<SyncOnDrop<'s>>,
}

enum Value {
    U32(u32),
    U64(u64),
    F32(f32),
    Map(TensorMap),
}

impl Value {
    /// The address of the value, for the driver.
    fn address(&mut self) -> *mut c_void {
        match self {
            Self::U32(value) => std::ptr::from_mut(value).cast(),
            Self::U64(value) => std::ptr::from_mut(value).cast(),
            Self::F32(value) => std::ptr::from_mut(value).cast(),
            Self::Map(map) => std::ptr::from_mut(map).cast(),
        }
    }
}

impl Driver {
    fn operand<'s>(&'s self, arg: &'s mut Arg<'_, Memory>) -> Result<Operand<'s>> {
        let (value, used) = match arg {
            Arg::U32(value) => (Value::U32(*value), None),
            Arg::U64(value) => (Value::U64(*value), None),
            Arg::F32(value) => (Value::F32(*value), None),
            Arg::Null => (Value::U64(0), None),
            Arg::Read(memory, offset) => {
                let (address, used) = self.as_read(memory);
                (Value::U64(address + *offset as u64), used)
            }
            Arg::Write(memory, offset) => {
                let (address, used) = self.to_write(memory);
                (Value::U64(address + *offset as u64), used)
            }
            Arg::ReadTiles(memory, tiles) => {
                let (address, used) = self.as_read(memory);
                (Value::Map(self.map(address, *tiles)?), used)
            }
            Arg::WriteTiles(memory, tiles) => {
                let (address, used) = self.to_write(memory);
                (Value::Map(self.map(address, *tiles)?), used)
            }
        };
        Ok(Operand { value, _used: used })
    }

    /// The address of memory that is read. cudarc already knows about lent memory.
    fn as_read<'s>(&'s self, memory: &'s Memory) -> (sys::CUdeviceptr, Option<SyncOnDrop<'s>>) {
        let Some(slice) = memory.slice() else { return (memory.lent_address(), None) };
        let (address, used) = slice.device_ptr(&self.stream);
        (address, Some(used))
    }

    /// The address of memory that is written. cudarc already knows about lent memory.
    fn to_write<'s>(&'s self, memory: &'s mut Memory) -> (sys::CUdeviceptr, Option<SyncOnDrop<'s>>) {
        let lent = memory.lent_address();
        let Some(slice) = memory.slice_mut() else { return (lent, None) };
        let (address, used) = slice.device_ptr_mut(&self.stream);
        (address, Some(used))
    }

    /// Encodes a tensor map.
    fn map(&self, address: sys::CUdeviceptr, tiles: Tiles) -> Result<TensorMap> {
        let maps = self.maps.ok_or(DriverError(CUresult::CUDA_ERROR_NOT_SUPPORTED));
        maps.and_then(|maps| maps.encode(address, tiles)).map_err(|error| failed("tensor map", error))
    }

    /// Launches a kernel after all earlier work; if it overlaps, its blocks may start before the previous launch has ended.
    fn start(
        &self,
        plan: Plan,
        overlapping: Option<OverlappingLaunch>,
        params: &mut [*mut c_void],
    ) -> std::result::Result<(), DriverError> {
        self.stream.context().bind_to_thread()?; // also returns errors of waiting for operands
        let (function, stream) = (self.kernels[&plan.kernel].cu_function(), self.stream.cu_stream());
        // SAFETY: the verb built the launch from a checked request: each operand is a view, with the shape and row stride of the
        // sizes passed with it, of memory that a driver allocated (launches for other devices have another type), or that is lent
        // for longer than the request lives, on this stream (`check_stream`, `check_lendable`). Kernels touch nothing outside
        // those shapes (the interpreter in the tests watches every access). The addresses in `params` are of values that live
        // until the call returns. A kernel that overlaps reads what launches of its verb write, or writes, only after it has
        // waited for the previous launch (the interpreter watches that too).
        unsafe {
            match overlapping {
                Some(overlapping) => overlapping.launch(plan, function, stream, params),
                None => result::launch_kernel(function, (plan.grid, 1, 1), (plan.block, 1, 1), plan.shared, stream, params),
            }
        }
    }
}

/// Stops the default pool of a GPU from returning freed memory to the system. A pool that the caller has set is left alone.
///
/// Without a limit: the driver compares the limit with used and unused memory together, so a limit below the size of a model
/// would return all unused memory at each synchronisation. The pool thus holds as much as was ever in use at once, and fragments.
fn retain_freed_memory(context: &CudaContext) -> std::result::Result<(), DriverError> {
    let (threshold, mut bytes) = (CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, u64::MAX);
    // SAFETY: the device is the context's, whose default pool cannot be destroyed; the value is 64 bits, as this attribute
    // requires.
    unsafe {
        let pool = result::device::get_default_mem_pool(context.cu_device())?;
        result::mem_pool::set_attribute(pool, threshold, std::ptr::from_mut(&mut bytes).cast())
    }
}

/// The driver's CUDA version: 1000 · major + 10 · minor.
fn version() -> Result<i32> {
    let mut version = 0;
    // SAFETY: the driver writes one `int` to a variable of ours.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(|error| failed("driver version", error))?;
    Ok(version)
}

/// The kernels of one of the two PTX files.
fn kernels(for_hopper: bool) -> impl Iterator<Item = Kernel> {
    Kernel::ALL.iter().copied().filter(move |kernel| kernel.is_for_hopper() == for_hopper)
}

/// Looks up a kernel in a module, by its name without the element type.
fn function(module: &Arc<CudaModule>, kernel: Kernel, dtype: DType) -> Result<(Kernel, CudaFunction)> {
    let symbol = format!("{kernel}_{dtype}");
    let function = module.load_function(&symbol).map_err(|error| failed(&symbol, error))?;
    Ok((kernel, function))
}

/// Compiles PTX for the GPU.
fn load(context: &Arc<CudaContext>, ptx: &str) -> Result<Arc<CudaModule>> {
    context.load_module(Ptx::from_src(ptx)).map_err(|error| match failed("cannot load the kernels", error) {
        Error::Device { backend, reason } => {
            let log = compiler_log(ptx).unwrap_or_default();
            Error::Device { backend, reason: format!("{reason}; {log}") }
        }
        allocation_error => allocation_error,
    })
}

/// The log of the driver's compiler for PTX that it refused. The context is current, since `load_module` was called.
fn compiler_log(ptx: &str) -> Option<String> {
    let source = CString::new(ptx).ok()?;
    let mut log = vec![0u8; 8 << 10];
    let mut options = [CUjit_option::CU_JIT_ERROR_LOG_BUFFER, CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    let mut values = [log.as_mut_ptr().cast(), std::ptr::without_provenance_mut::<c_void>(log.len())];
    let mut module = std::ptr::null_mut();
    // SAFETY: the source ends with a zero; the options are a buffer and its length, and the buffer outlives the call.
    unsafe { cuModuleLoadDataEx(&mut module, source.as_ptr().cast(), 2, options.as_mut_ptr(), values.as_mut_ptr()) };
    let end = log.iter().position(|&byte| byte == 0)?;
    Some(String::from_utf8_lossy(&log[..end]).trim().to_owned())
}

/// The same memory as `len` elements of another type, of at most as many bytes, with its ownership.
pub(super) fn as_elements<T: Pod, U: Pod>(slice: CudaSlice<T>, len: usize) -> CudaSlice<U> {
    debug_assert!(len * size_of::<U>() <= slice.num_bytes());
    let stream = Arc::clone(slice.stream());
    let address = slice.leak(); // after the stream has waited for other users
    // SAFETY: the memory belongs to the context of that stream, is long enough, is valid for any `Pod`, and nothing else frees
    // it.
    unsafe { stream.upgrade_device_ptr(address, len) }
}

/// The address of lent memory. Errors: [`Error::Value`] if it is not a multiple of the element size.
fn aligned<T: Element>(address: sys::CUdeviceptr) -> Result<sys::CUdeviceptr> {
    let fits = address.is_multiple_of(size_of::<T>() as u64);
    Error::unless(fits, "lend", "view", format!("at address {address:#x}"), "elements at multiples of their size")?;
    Ok(address)
}

/// The error of a copy between the host and lent memory, which only the lender may do.
fn lent_memory_error(what: &str) -> Error {
    Error::Device { backend: NAME, reason: format!("{what}: the memory is lent; only its owner may copy it") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_drivers_do_not_get_hopper_kernels() {
        for version in [11080, 11999] {
            assert_eq!(loadable((9, 0), version), (8, 9));
        }
        for (capability, version) in [((9, 0), 12000), ((9, 0), 13000), ((8, 0), 11040), ((8, 6), 12000), ((10, 0), 12080)] {
            assert_eq!(loadable(capability, version), capability);
        }
    }
}
