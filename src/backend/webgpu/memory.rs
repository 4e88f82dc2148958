//! Memory of the adapter: buffers, and the pool they come from and go back to.

use std::collections::HashMap;
use std::fmt;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::dispatch::Gpu;
use super::plan::Limits;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::tensor::Shape;

/// Bytes that buffers nobody holds may keep. Beyond it they go back to the driver.
const IDLE_BYTES: u64 = 256 << 20;
/// Sizes are rounded up to a multiple of it, so that buffers of about the same size are of use to one another.
const GRAIN: u64 = 256;

/// Storage that verbs read and write.
const STORAGE: wgpu::BufferUsages =
    wgpu::BufferUsages::STORAGE.union(wgpu::BufferUsages::COPY_SRC).union(wgpu::BufferUsages::COPY_DST);
/// Where downloads land.
pub(super) const STAGING: wgpu::BufferUsages = wgpu::BufferUsages::MAP_READ.union(wgpu::BufferUsages::COPY_DST);

/// A lock, whatever became of the thread that held it: what is behind it is whole between any two statements.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Elements in a range of a buffer, a tensor's or lent: what views look at.
///
/// It has no size known to the compiler, so that nobody can swap the memory of two of them. `Slice<T, [(); 0]>` is one that has.
pub struct Slice<T: Element, Tail: ?Sized = [()]> {
    raw: wgpu::Buffer,
    /// Elements of the buffer before the first.
    first: usize,
    len: usize,
    element: PhantomData<T>,
    _tail: Tail,
}

/// A slice that can be held in a variable.
pub(super) type HeldSlice<T> = Slice<T, [(); 0]>;

impl<T: Element> HeldSlice<T> {
    pub(super) fn new(raw: wgpu::Buffer, first: usize, len: usize) -> Self {
        Self { raw, first, len, element: PhantomData, _tail: [] }
    }
}

impl<T: Element> Slice<T> {
    /// The buffer that it is a range of.
    pub fn raw(&self) -> &wgpu::Buffer {
        &self.raw
    }

    /// Elements of the buffer before the first of the slice.
    pub fn first(&self) -> usize {
        self.first
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }
}

/// Elements in the memory of an adapter. Its memory goes back to a pool when it is dropped.
pub struct Buffer<T: Element> {
    memory: Memory,
    /// All of them.
    slice: HeldSlice<T>,
}

impl<T: Element> Buffer<T> {
    /// Memory whose contents are of no account: whoever asks for it overwrites all of it.
    pub(super) fn unwritten(gpu: &Arc<Gpu>, len: usize) -> Result<Self> {
        Ok(Self::of(Memory::take(gpu, STORAGE, fitting::<T>(gpu, len)?)?.0, len))
    }

    /// All zeros.
    pub(super) fn zeros(gpu: &Arc<Gpu>, len: usize) -> Result<Self> {
        let (memory, used) = Memory::take(gpu, STORAGE, fitting::<T>(gpu, len)?)?;
        if used {
            gpu.clear(&memory.raw)?; // the driver clears new memory itself
        }
        Ok(Self::of(memory, len))
    }

    fn of(memory: Memory, len: usize) -> Self {
        Self { slice: Slice::new(memory.raw.clone(), 0, len), memory }
    }

    /// Copies as many elements from the host.
    pub(super) fn write(&self, host: &[T]) -> Result<()> {
        Error::unless(host.len() == self.len(), "write", "host", host.len(), "as many elements as the buffer")?;
        let bytes: &[u8] = bytemuck::cast_slice(host);
        // Copies are of whole words; an odd number of 16-bit elements ends within one.
        let (words, rest) = bytes.split_at(bytes.len() / 4 * 4);
        self.memory.gpu.write(&self.memory.raw, 0, words)?;
        if !rest.is_empty() {
            let mut word = [0; 4];
            word[..rest.len()].copy_from_slice(rest);
            self.memory.gpu.write(&self.memory.raw, words.len() as u64, &word)?;
        }
        Ok(())
    }

    /// Copies as many elements to the host, once everything that writes them is done.
    pub(super) fn read(&self, host: &mut [T]) -> Result<()> {
        Error::unless(host.len() == self.len(), "download", "host", host.len(), "as many elements as the buffer")?;
        if host.is_empty() {
            return self.memory.gpu.synchronize();
        }
        let host: &mut [u8] = bytemuck::cast_slice_mut(host);
        let words = (host.len() as u64).next_multiple_of(4);
        let (staging, _) = Memory::take(&self.memory.gpu, STAGING, words)?;
        self.memory.gpu.read(&self.memory.raw, &staging.raw, words, host)
    }

    /// How many elements it holds.
    pub(super) fn len(&self) -> usize {
        self.slice.len
    }

    /// All of them, to be read.
    pub(super) fn slice(&self) -> &Slice<T> {
        &self.slice
    }

    /// All of them, to be written.
    pub(super) fn slice_mut(&mut self) -> &mut Slice<T> {
        &mut self.slice
    }

    /// The buffer itself, for a pipeline of the caller's own. It may be longer than its elements, and is another tensor's
    /// once this one is dropped.
    pub fn raw(&self) -> &wgpu::Buffer {
        &self.memory.raw
    }
}

impl<T: Element> fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} × {})", self.len(), std::any::type_name::<T>())
    }
}

/// Bytes for `len` elements, if the adapter has buffers of that size and the shaders' 32-bit indices reach to its end.
fn fitting<T: Element>(gpu: &Gpu, len: usize) -> Result<u64> {
    let bytes = (len as u64).checked_mul(size_of::<T>() as u64).filter(|_| len < u32::MAX as usize);
    let largest = gpu.device.limits().max_buffer_size / GRAIN * GRAIN;
    let limit = "the largest buffer of this adapter";
    bytes.filter(|&bytes| bytes <= largest).ok_or(Error::TooLarge { shape: Shape { rows: 1, cols: len }, limit })
}

/// A buffer of the driver's on loan from the pool.
pub(super) struct Memory {
    gpu: Arc<Gpu>,
    pub(super) raw: wgpu::Buffer,
}

impl Memory {
    /// At least `bytes` bytes, and whether somebody has used them before.
    pub(super) fn take(gpu: &Arc<Gpu>, usage: wgpu::BufferUsages, bytes: u64) -> Result<(Self, bool)> {
        let size = bytes.max(1).next_multiple_of(GRAIN);
        let idle = lock(&gpu.pool).take(usage, size);
        let used = idle.is_some();
        let raw = match idle {
            Some(raw) => raw,
            None => Self::create(gpu, usage, size)?,
        };
        Ok((Self { gpu: gpu.clone(), raw }, used))
    }

    /// Where the driver has no memory left, the pool may: the driver gets that back once nothing recorded needs it.
    fn create(gpu: &Gpu, usage: wgpu::BufferUsages, size: u64) -> Result<wgpu::Buffer> {
        let refused = match gpu.create_buffer(usage, size) {
            Err(refused @ Error::OutOfMemory { .. }) => refused,
            other => return other,
        };
        if lock(&gpu.pool).forget() == 0 {
            return Err(refused);
        }
        gpu.synchronize()?;
        gpu.create_buffer(usage, size)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        lock(&self.gpu.pool).give(self.raw.clone());
    }
}

/// Buffers that nobody holds, by use and size: a training step asks for the same ones again and again.
///
/// Commands run in the order in which they were recorded, so a buffer may be lent again before the device is done with it.
#[derive(Default)]
pub(super) struct Pool {
    idle: HashMap<(wgpu::BufferUsages, u64), Vec<wgpu::Buffer>>,
    bytes: u64,
}

impl Pool {
    fn take(&mut self, usage: wgpu::BufferUsages, size: u64) -> Option<wgpu::Buffer> {
        let buffer = self.idle.get_mut(&(usage, size))?.pop()?;
        self.bytes -= size;
        Some(buffer)
    }

    /// Lends none of them again. Returns their bytes.
    fn forget(&mut self) -> u64 {
        self.idle.clear();
        std::mem::take(&mut self.bytes)
    }

    fn give(&mut self, buffer: wgpu::Buffer) {
        if self.bytes + buffer.size() <= IDLE_BYTES {
            self.bytes += buffer.size();
            self.idle.entry((buffer.usage(), buffer.size())).or_default().push(buffer);
        }
    }
}

/// What an adapter lets a launch use. Bindings stay below 2 GiB, so that 32-bit indices reach everywhere.
pub(super) fn limits_of(gpu: &Gpu) -> Limits {
    let limits = gpu.device.limits();
    Limits {
        invocations: limits.max_compute_invocations_per_workgroup.min(limits.max_compute_workgroup_size_x),
        workgroup_bytes: limits.max_compute_workgroup_storage_size,
        groups: limits.max_compute_workgroups_per_dimension,
        binding_bytes: limits.max_storage_buffer_binding_size.min(1 << 31),
        subgroup: subgroup(&gpu.device),
        matrix: gpu.matrix,
    }
}

/// How many invocations a subgroup has, if that is known.
fn subgroup(device: &wgpu::Device) -> u32 {
    let info = device.adapter_info();
    let known = device.features().contains(wgpu::Features::SUBGROUP) && info.subgroup_min_size == info.subgroup_max_size;
    if known { info.subgroup_min_size } else { 0 }
}
