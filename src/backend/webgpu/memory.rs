//! Device memory: buffers, and the pool that reuses them.

use std::collections::HashMap;
use std::fmt;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::dispatch::Gpu;
use super::plan::Limits;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::tensor::Shape;

/// Bytes of free buffers in the pool. Beyond that, buffers are freed.
const IDLE_BYTES: u64 = 256 << 20;
/// Sizes are rounded up to a multiple of this, so that a buffer can serve tensors of nearly the same size.
const GRAIN: u64 = 256;

/// Usage of buffers that verbs read and write.
const STORAGE: wgpu::BufferUsages =
    wgpu::BufferUsages::STORAGE.union(wgpu::BufferUsages::COPY_SRC).union(wgpu::BufferUsages::COPY_DST);
/// Usage of buffers for downloads.
pub(super) const STAGING: wgpu::BufferUsages = wgpu::BufferUsages::MAP_READ.union(wgpu::BufferUsages::COPY_DST);

/// Locks a mutex, also after a panic of another holder: its contents are consistent between any two statements.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Elements in a range of a buffer, a tensor's or a lent one: the memory of views.
///
/// The type is unsized, so that the memory of two slices cannot be swapped. `Slice<T, [(); 0]>` is a sized one.
pub struct Slice<T: Element, Tail: ?Sized = [()]> {
    raw: wgpu::Buffer,
    /// Offset of the first element in the buffer, in elements.
    first: usize,
    len: usize,
    element: PhantomData<T>,
    _tail: Tail,
}

/// A sized slice, for variables.
pub(super) type HeldSlice<T> = Slice<T, [(); 0]>;

impl<T: Element> HeldSlice<T> {
    pub(super) fn new(raw: wgpu::Buffer, first: usize, len: usize) -> Self {
        Self { raw, first, len, element: PhantomData, _tail: [] }
    }
}

impl<T: Element> Slice<T> {
    /// The buffer that contains the slice.
    pub fn raw(&self) -> &wgpu::Buffer {
        &self.raw
    }

    /// Offset of the slice in the buffer, in elements.
    pub fn first(&self) -> usize {
        self.first
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }
}

/// Elements in device memory. When it is dropped, its memory goes back to the pool.
pub struct Buffer<T: Element> {
    memory: Memory,
    /// The slice of all elements.
    slice: HeldSlice<T>,
}

impl<T: Element> Buffer<T> {
    /// Uninitialised elements, which the caller overwrites.
    pub(super) fn unwritten(gpu: &Arc<Gpu>, len: usize) -> Result<Self> {
        Ok(Self::of(Memory::take(gpu, STORAGE, fitting::<T>(gpu, len)?)?.0, len))
    }

    /// Zeros.
    pub(super) fn zeros(gpu: &Arc<Gpu>, len: usize) -> Result<Self> {
        let (memory, used) = Memory::take(gpu, STORAGE, fitting::<T>(gpu, len)?)?;
        if used {
            gpu.clear(&memory.raw)?; // new memory is zero already
        }
        Ok(Self::of(memory, len))
    }

    fn of(memory: Memory, len: usize) -> Self {
        Self { slice: Slice::new(memory.raw.clone(), 0, len), memory }
    }

    /// Copies from the host a slice of the same length.
    pub(super) fn write(&self, host: &[T]) -> Result<()> {
        Error::unless(host.len() == self.len(), "write", "host", host.len(), "as many elements as the buffer")?;
        let bytes: &[u8] = bytemuck::cast_slice(host);
        // Copies are of whole words; an odd number of 16-bit elements ends inside one.
        let (words, rest) = bytes.split_at(bytes.len() / 4 * 4);
        self.memory.gpu.write(&self.memory.raw, 0, words)?;
        if !rest.is_empty() {
            let mut word = [0; 4];
            word[..rest.len()].copy_from_slice(rest);
            self.memory.gpu.write(&self.memory.raw, words.len() as u64, &word)?;
        }
        Ok(())
    }

    /// Copies to the host, after everything that writes the elements.
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

    /// The number of elements.
    pub(super) fn len(&self) -> usize {
        self.slice.len
    }

    /// All elements, to be read.
    pub(super) fn slice(&self) -> &Slice<T> {
        &self.slice
    }

    /// All elements, to be written.
    pub(super) fn slice_mut(&mut self) -> &mut Slice<T> {
        &mut self.slice
    }

    /// The buffer, for a pipeline of the caller's. It may be longer than its elements, and is reused for another tensor after
    /// this one is dropped.
    pub fn raw(&self) -> &wgpu::Buffer {
        &self.memory.raw
    }
}

impl<T: Element> fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} × {})", self.len(), std::any::type_name::<T>())
    }
}

/// Bytes of `len` elements, if the adapter allows buffers of that size and the shaders' 32-bit indices reach the end.
fn fitting<T: Element>(gpu: &Gpu, len: usize) -> Result<u64> {
    let bytes = (len as u64).checked_mul(size_of::<T>() as u64).filter(|_| len < u32::MAX as usize);
    let largest = gpu.device.limits().max_buffer_size / GRAIN * GRAIN;
    let limit = "the largest buffer of this adapter";
    bytes.filter(|&bytes| bytes <= largest).ok_or(Error::TooLarge { shape: Shape { rows: 1, cols: len }, limit })
}

/// A buffer from the pool.
pub(super) struct Memory {
    gpu: Arc<Gpu>,
    pub(super) raw: wgpu::Buffer,
}

impl Memory {
    /// Takes a buffer of at least `bytes` bytes; also returns true if it was used before.
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

    /// If the driver has no memory left, frees the pool's buffers once no recorded command needs them, and tries again.
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

/// Free buffers by usage and size.
///
/// Commands run in the order in which they were recorded, so a buffer may be reused before the device has finished with it.
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

    /// Drops all free buffers. Returns their bytes.
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

/// The limits of launches on this device. Bindings stay below 2 GiB, so that 32-bit indices reach every element.
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

/// Invocations of a subgroup; 0 if subgroups are not supported or vary in size.
fn subgroup(device: &wgpu::Device) -> u32 {
    let info = device.adapter_info();
    let known = device.features().contains(wgpu::Features::SUBGROUP) && info.subgroup_min_size == info.subgroup_max_size;
    if known { info.subgroup_min_size } else { 0 }
}
