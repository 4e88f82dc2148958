//! One GPU, through NVIDIA's driver. Here and in `newer.rs` is what `unsafe` this backend has.
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
use super::lend::{Lent, LentMut};
use super::memory::Memory;
use super::newer::{Maps, Overlapping, TensorMap, library};
use super::plan::{KERNELS, Plan};
use super::{NAME, from_hopper_on, hopper, hopper_ptx, ptx};
use crate::element::{DType, Element};
use crate::error::{Error, Result};

/// Bytes of shared memory that a block may ask for on Hopper.
const MOST_SHARED: i32 = 227 << 10;
/// The first version of the driver in whose graphs launches may overlap: CUDA 12.3.
const OVERLAPS_IN_GRAPHS: i32 = 12030;

/// The first version that reads the PTX of Hopper's kernels (PTX 8.0) and makes tensor maps: CUDA 12.0.
const HAS_HOPPERS_PTX: i32 = 12000;

/// What the driver calls a stream that each thread has its own of: `CU_STREAM_PER_THREAD`.
const PER_THREAD: sys::CUstream = std::ptr::without_provenance_mut(2);

/// A stream of a GPU, and the kernels of one element type, loaded there.
///
/// Nobody outside this crate can make one, or a [`Launch`] for it: every one is a verb's, whose request proved the shapes, and names
/// memory that a driver allocated.
pub struct Driver {
    stream: Arc<CudaStream>,
    /// The only thread that can name the stream, if it is each thread's own.
    thread: Option<ThreadId>,
    kernels: HashMap<&'static str, CudaFunction>,
    gpu: Gpu,
    /// How launches of a verb overlap, where they may.
    overlapping: Option<Overlapping>,
    /// Who makes tensor maps.
    maps: Option<Maps>,
}

impl Driver {
    /// The stream that everything is launched on.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// The GPU with that number, on its default stream.
    pub(super) fn open(ordinal: usize, dtype: DType) -> Result<Self> {
        let unavailable = |reason: String| Error::Unavailable { backend: NAME, reason };
        library().map_err(|reason| unavailable(reason.to_owned()))?; // cudarc panics at its first call if there is none
        let count = CudaContext::device_count().map_err(|error| unavailable(describe(error)))?;
        if ordinal >= count as usize {
            return Err(unavailable(format!("there is no GPU {ordinal}; the driver sees {count}")));
        }
        let context = CudaContext::new(ordinal).map_err(|error| unavailable(describe(error)))?;
        if context.has_async_alloc() {
            keep_memory(&context).map_err(|error| failed("memory pool", error))?;
        }
        Self::from_stream(context.default_stream(), dtype)
    }

    /// A stream of the caller's.
    pub(super) fn from_stream(stream: Arc<CudaStream>, dtype: DType) -> Result<Self> {
        let thread = (stream.cu_stream() == PER_THREAD).then(|| std::thread::current().id());
        let version = version()?;
        let (gpu, from_hopper) = gpu(stream.context(), version)?;
        let overlapping = Overlapping::find().filter(|_| from_hopper && version >= OVERLAPS_IN_GRAPHS);
        let ptx = if from_hopper { from_hopper_on(ptx(dtype)) } else { ptx(dtype).to_owned() };
        let module = load(stream.context(), &ptx)?;
        let mut kernels: HashMap<_, _> = KERNELS.into_iter().map(|stem| function(&module, stem, dtype)).collect::<Result<_>>()?;
        if let (Some(ptx), (9, 0)) = (hopper_ptx(dtype), gpu.capability) {
            kernels.extend(of_hopper(stream.context(), ptx, dtype)?);
        }
        Ok(Self { kernels, gpu, overlapping, maps: Maps::find(), stream, thread })
    }
}

/// What plans depend on, and whether the GPU is Hopper or came after. Errors: [`Error::Unavailable`] if it is older than the kernels.
fn gpu(context: &CudaContext, version: i32) -> Result<(Gpu, bool)> {
    let (major, minor) = context.compute_capability().map_err(|error| failed("compute capability", error))?;
    if major < 8 {
        let reason = format!("the GPU has compute capability {major}.{minor}; the kernels need 8.0");
        return Err(Error::Unavailable { backend: NAME, reason });
    }
    let multiprocessors = context.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
    let multiprocessors = multiprocessors.map_err(|error| failed("multiprocessors", error))? as u32;
    let capability = (major as u32, minor as u32);
    Ok((Gpu { capability: served(capability, version), multiprocessors }, capability >= (9, 0)))
}

/// The compute capability whose kernels a driver of that version can load: those for Hopper alone are beyond an older one, and plans
/// then do without.
fn served(capability: (u32, u32), version: i32) -> (u32, u32) {
    if capability == (9, 0) && version < HAS_HOPPERS_PTX { (8, 9) } else { capability }
}

/// The kernels for Hopper alone.
fn of_hopper(context: &Arc<CudaContext>, ptx: &str, dtype: DType) -> Result<Vec<(&'static str, CudaFunction)>> {
    let module = load(context, ptx)?;
    let most = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    let large = |kernel| {
        let (stem, function) = function(&module, kernel, dtype)?;
        function.set_attribute(most, MOST_SHARED).map_err(|error| failed(stem, error))?;
        Ok((stem, function))
    };
    hopper::kernels().map(large).collect()
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
        self.on_its_thread()?;
        // SAFETY: bytes need no initial value; every kernel writes its outputs before another reads them.
        let slice = unsafe { self.stream.alloc(bytes.max(1)) };
        slice.map(|slice| Memory::new(slice, self.thread)).map_err(|error| no_room(bytes, error))
    }

    fn zeros(&self, bytes: usize) -> Result<Memory> {
        self.on_its_thread()?;
        let slice = self.stream.alloc_zeros(bytes.max(1));
        slice.map(|slice| Memory::new(slice, self.thread)).map_err(|error| no_room(bytes, error))
    }

    fn write(&self, memory: &mut Memory, host: &[u8]) -> Result<()> {
        if host.is_empty() {
            return Ok(());
        }
        self.may_copy("copy to the GPU", memory)?;
        let slice = memory.slice_mut().ok_or_else(|| is_lent("copy to the GPU"))?;
        let copied = self.stream.memcpy_htod(host, slice);
        // The driver may still be reading: what is pinned it copies later, what is not it need not copy at once.
        copied.and_then(|()| self.stream.synchronize()).map_err(|error| failed("copy to the GPU", error))
    }

    fn read(&self, memory: &Memory, host: &mut [u8]) -> Result<()> {
        if host.is_empty() {
            return self.synchronize();
        }
        self.may_copy("copy from the GPU", memory)?;
        let slice = memory.slice().ok_or_else(|| is_lent("copy from the GPU"))?;
        let copied = self.stream.memcpy_dtoh(&slice.slice(..host.len()), host);
        copied.and_then(|()| self.stream.synchronize()).map_err(|error| failed("copy from the GPU", error))
    }

    fn bytes(memory: &Memory) -> usize {
        memory.bytes()
    }

    /// Of an allocation the driver says that it begins at a multiple of 256 bytes.
    fn address(memory: &Memory) -> u64 {
        memory.lent_address()
    }

    fn launch(&self, launch: Launch<'_, Self>) -> Result<()> {
        let (plan, overlapping) = (launch.plan(), self.overlapping.filter(|_| launch.overlaps()));
        let mut args = launch.into_args();
        self.own(plan.kernel, args.iter().filter_map(memory_of))?;
        self.bind()?; // tensor maps are made for the context that is current
        let mut operands: Vec<_> = args.iter_mut().map(|arg| self.operand(arg)).collect::<Result<_>>()?;
        let mut params: Vec<_> = operands.iter_mut().map(|operand| operand.value.address()).collect();
        let started = self.start(plan, overlapping, &mut params);
        started.map_err(|error| failed(plan.kernel, error))
    }

    fn synchronize(&self) -> Result<()> {
        self.on_its_thread()?;
        self.stream.synchronize().map_err(|error| failed("synchronize", error))
    }
}

impl Driver {
    /// Memory of the caller's, to be read. While the loan lasts, cudarc knows of it as of a kernel that reads.
    pub(super) fn lend<'a, T: Element>(&'a self, view: &'a CudaView<'_, T>) -> Result<Lent<'a, T>> {
        self.may_borrow("view", view)?;
        let (address, used) = view.device_ptr(&self.stream);
        let memory = Memory::lent(aligned::<T>(address)?, view.num_bytes(), &self.stream);
        Ok(Lent::new(memory, view.len(), used))
    }

    /// Memory of the caller's, to be written.
    pub(super) fn lend_mut<'a, T: Element>(&'a self, view: &'a mut CudaViewMut<'_, T>) -> Result<LentMut<'a, T>> {
        self.may_borrow("view", view)?;
        let (len, bytes) = (view.len(), view.num_bytes());
        let (address, used) = view.device_ptr_mut(&self.stream);
        let memory = Memory::lent(aligned::<T>(address)?, bytes, &self.stream);
        Ok(LentMut::new(memory, len, used))
    }

    /// Takes a slice of the caller's, which is freed as what was allocated here is.
    pub(super) fn adopt<T: Element>(&self, slice: CudaSlice<T>) -> Result<Memory> {
        self.may_borrow("slice", &slice)?;
        let bytes = slice.num_bytes();
        Ok(Memory::new(as_elements(slice, bytes), self.thread))
    }

    /// `Err` unless a view is of this stream.
    fn may_borrow<T>(&self, name: &'static str, view: &impl DeviceSlice<T>) -> Result<()> {
        self.on_its_thread()?;
        let (here, there) = (&self.stream, view.stream());
        let same = (here.context().cu_ctx(), here.cu_stream()) == (there.context().cu_ctx(), there.cu_stream());
        let got = format!("memory of another stream, on GPU {}", there.context().ordinal());
        Error::unless(same, "lend", name, got, "memory of this backend's stream")
    }

    /// `Err` where each thread has a stream of its own and this is not the thread whose stream it is: the name would mean another.
    fn on_its_thread(&self) -> Result<()> {
        if self.thread.is_none_or(|thread| thread == std::thread::current().id()) {
            return Ok(());
        }
        let reason = "the stream is each thread's own, and this backend was made on another thread; make one on this thread, \
                      or from a stream that is the same on every thread";
        Err(Error::Device { backend: NAME, reason: reason.into() })
    }

    /// Makes the context current on this thread. Errors: also what cudarc could not return earlier, such as when it waited.
    fn bind(&self) -> Result<()> {
        self.stream.context().bind_to_thread().map_err(|error| failed("context", error))
    }

    /// `Err` unless the memory lies on this stream, and while the stream is captured: a copy would be a part of the graph, and touch
    /// the host's memory at each launch of it, whoever has that memory then.
    fn may_copy(&self, what: &str, memory: &Memory) -> Result<()> {
        self.own(what, [memory])?;
        let status = self.stream.capture_status().map_err(|error| failed(what, error))?;
        if status == sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE {
            return Ok(());
        }
        let reason = format!("{what}: not while the stream is captured in a graph, which would copy anew at each launch");
        Err(Error::Device { backend: NAME, reason })
    }

    /// `Err` unless every operand lies on this stream.
    ///
    /// Another stream's would mean nothing on another GPU, and on this one nobody says when it is written, and when it may be freed:
    /// cudarc's events do not, as a slice remembers only the last stream that read it.
    fn own<'m>(&self, what: &str, operands: impl IntoIterator<Item = &'m Memory>) -> Result<()> {
        self.on_its_thread()?;
        let here = (self.stream.context().cu_ctx(), self.stream.cu_stream());
        let place = |stream: &CudaStream| (stream.context().cu_ctx(), stream.cu_stream());
        let mut streams = operands.into_iter().map(|memory| memory.stream());
        let Some(other) = streams.find(|stream| place(stream) != here) else { return Ok(()) };
        let [there, ordinal] = [other, &self.stream].map(|stream| stream.context().ordinal());
        let reason = match there == ordinal {
            false => format!("{what}: a tensor lies on GPU {there}, not on GPU {ordinal}"),
            true => format!("{what}: a tensor was made on another stream of GPU {ordinal}, which nobody orders with this one"),
        };
        Err(Error::Device { backend: NAME, reason })
    }
}

/// Where an operand lies.
fn memory_of<'m>(arg: &'m Arg<'_, Memory>) -> Option<&'m Memory> {
    match arg {
        Arg::Read(memory, _) | Arg::ReadTiles(memory, _) => Some(memory),
        Arg::Write(memory, _) | Arg::WriteTiles(memory, _) => Some(memory),
        Arg::U32(_) | Arg::U64(_) | Arg::F32(_) | Arg::Null => None,
    }
}

/// An argument on its way into a launch: its bytes, and cudarc's note that the memory behind it is used, which it makes when it is
/// dropped: after the launch.
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
    /// Where the driver finds it.
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
                let (address, used) = self.to_read(memory);
                (Value::U64(address + *offset as u64), used)
            }
            Arg::Write(memory, offset) => {
                let (address, used) = self.to_write(memory);
                (Value::U64(address + *offset as u64), used)
            }
            Arg::ReadTiles(memory, tiles) => {
                let (address, used) = self.to_read(memory);
                (Value::Map(self.map(address, *tiles)?), used)
            }
            Arg::WriteTiles(memory, tiles) => {
                let (address, used) = self.to_write(memory);
                (Value::Map(self.map(address, *tiles)?), used)
            }
        };
        Ok(Operand { value, _used: used })
    }

    /// Where memory lies that is read; cudarc has been told of memory that is lent.
    fn to_read<'s>(&'s self, memory: &'s Memory) -> (sys::CUdeviceptr, Option<SyncOnDrop<'s>>) {
        let Some(slice) = memory.slice() else { return (memory.lent_address(), None) };
        let (address, used) = slice.device_ptr(&self.stream);
        (address, Some(used))
    }

    /// The same of memory that is written.
    fn to_write<'s>(&'s self, memory: &'s mut Memory) -> (sys::CUdeviceptr, Option<SyncOnDrop<'s>>) {
        let lent = memory.lent_address();
        let Some(slice) = memory.slice_mut() else { return (lent, None) };
        let (address, used) = slice.device_ptr_mut(&self.stream);
        (address, Some(used))
    }

    /// A tensor map.
    fn map(&self, address: sys::CUdeviceptr, tiles: Tiles) -> Result<TensorMap> {
        let maps = self.maps.ok_or(DriverError(CUresult::CUDA_ERROR_NOT_SUPPORTED));
        maps.and_then(|maps| maps.encode(address, tiles)).map_err(|error| failed("tensor map", error))
    }

    /// Launches a kernel once everything before has ended; if it overlaps, its blocks may come before the launch before it has.
    fn start(
        &self,
        plan: Plan,
        overlapping: Option<Overlapping>,
        params: &mut [*mut c_void],
    ) -> std::result::Result<(), DriverError> {
        self.stream.context().bind_to_thread()?; // and what became of the waits for operands
        let (function, stream) = (self.kernels[plan.kernel].cu_function(), self.stream.cu_stream());
        // SAFETY: the verb built the launch from a checked request: each operand is a view, of the shape and the distance between
        // rows that the sizes beside it say, within memory that a driver allocated (a launch for another device is of another type),
        // or that somebody lends for longer than the request lives, on this stream (`own`, `may_borrow`); and kernels touch
        // nothing outside those shapes (the interpreter in the tests watches every access). The addresses are of
        // values that live until the call returns. Until it has waited for the launch before, no kernel that overlaps reads what
        // launches of its verb write, or writes anything (the interpreter watches that too).
        unsafe {
            match overlapping {
                Some(overlapping) => overlapping.launch(plan, function, stream, params),
                None => result::launch_kernel(function, (plan.grid, 1, 1), (plan.block, 1, 1), plan.shared, stream, params),
            }
        }
    }
}

/// Has the default pool of a GPU keep what is freed for who allocates next. Who gave the GPU another pool sees to that one.
///
/// All of it: the driver counts what is in use with what is idle, so a bound below what a model takes would give everything back each
/// time that somebody waits. So what lies idle and what is in use are together as much as ever was in use at once, and pieces between.
fn keep_memory(context: &CudaContext) -> std::result::Result<(), DriverError> {
    let (threshold, mut bytes) = (CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, u64::MAX);
    // SAFETY: the device is the context's, and nobody can destroy its default pool; the value is the 64 bits that this attribute has.
    unsafe {
        let pool = result::device::get_default_mem_pool(context.cu_device())?;
        result::mem_pool::set_attribute(pool, threshold, std::ptr::from_mut(&mut bytes).cast())
    }
}

/// The version of CUDA that the driver is for, 1000 times the first number and 10 times the second.
fn version() -> Result<i32> {
    let mut version = 0;
    // SAFETY: the number is ours to write.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(|error| failed("driver version", error))?;
    Ok(version)
}

/// One kernel of a module, under its stem.
fn function(module: &Arc<CudaModule>, stem: &'static str, dtype: DType) -> Result<(&'static str, CudaFunction)> {
    let symbol = format!("{stem}_{dtype}");
    let function = module.load_function(&symbol).map_err(|error| failed(&symbol, error))?;
    Ok((stem, function))
}

/// Compiles PTX for the GPU at hand.
fn load(context: &Arc<CudaContext>, ptx: &str) -> Result<Arc<CudaModule>> {
    context.load_module(Ptx::from_src(ptx)).map_err(|error| match failed("cannot load the kernels", error) {
        Error::Device { backend, reason } => {
            let log = compiler_log(ptx).unwrap_or_default();
            Error::Device { backend, reason: format!("{reason}; {log}") }
        }
        no_room => no_room,
    })
}

/// What the driver's compiler says about PTX that it refused; the context is current, since `load_module` was called.
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

/// The same memory as `len` elements of another type, which take no more of it; its owner changes hands.
pub(super) fn as_elements<T: Pod, U: Pod>(slice: CudaSlice<T>, len: usize) -> CudaSlice<U> {
    debug_assert!(len * size_of::<U>() <= slice.num_bytes());
    let stream = Arc::clone(slice.stream());
    let address = slice.leak(); // once the stream has waited for whoever uses it
    // SAFETY: the memory is of that stream's context, it holds as many elements, any bits are one, and nobody else frees it.
    unsafe { stream.upgrade_device_ptr(address, len) }
}

/// The address of memory that is lent. Errors: [`Error::Value`] if elements do not lie at multiples of their size there.
fn aligned<T: Element>(address: sys::CUdeviceptr) -> Result<sys::CUdeviceptr> {
    let fits = address.is_multiple_of(size_of::<T>() as u64);
    Error::unless(fits, "lend", "view", format!("at address {address:#x}"), "elements at multiples of their size")?;
    Ok(address)
}

/// Copies between the host and memory that is lent are the lender's.
fn is_lent(what: &str) -> Error {
    Error::Device { backend: NAME, reason: format!("{what}: the memory is lent") }
}

fn describe(error: DriverError) -> String {
    match error.error_string() {
        Ok(text) => format!("{} ({:?})", text.to_string_lossy(), error.0),
        Err(_) => format!("{:?}", error.0),
    }
}

/// What failed, in the driver's words; where it had no room, that.
fn failed(what: &str, error: DriverError) -> Error {
    match error.0 {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => Error::OutOfMemory { backend: NAME, bytes: 0 },
        _ => Error::Device { backend: NAME, reason: format!("{what}: {}", describe(error)) },
    }
}

/// The same of an allocation of so many bytes.
fn no_room(bytes: usize, error: DriverError) -> Error {
    match failed("allocate", error) {
        Error::OutOfMemory { backend, .. } => Error::OutOfMemory { backend, bytes },
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hoppers_kernels_are_left_to_drivers_that_can_load_them() {
        for version in [11080, 11999] {
            assert_eq!(served((9, 0), version), (8, 9));
        }
        for (capability, version) in [((9, 0), 12000), ((9, 0), 13000), ((8, 0), 11040), ((8, 6), 12000), ((10, 0), 12080)] {
            assert_eq!(served(capability, version), capability);
        }
    }

    #[test]
    fn no_room_is_an_error_of_its_own_whoever_wanted_it() {
        let error = DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY);
        assert_eq!(no_room(12, error).to_string(), "cuda: out of memory, allocating 12 bytes");
        assert_eq!(failed("lora_merge", error).to_string(), "cuda: out of memory, allocating data of the driver itself");
    }
}
