//! Pipelines, which are made once, and commands, which are recorded and submitted in batches.

use std::collections::HashMap;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, mpsc};

use super::cache::Cache;
use super::memory::{Pool, lock};
use super::shader::Kernel;
use crate::element::DType;
use crate::error::{Error, Result};
use crate::file;

/// Launches of a batch: enough for a training step, with a small uniform buffer.
const BATCH_LAUNCHES: u64 = 256;
/// Multiply-adds of a batch: half a product of 4096³, about 0.1 s on a slow GPU. Systems treat a device that is busy with one
/// submission for seconds as lost.
const BATCH_WORK: u64 = 1 << 35;
/// Bytes of a launch's uniforms, at most.
const UNIFORM_BYTES: u64 = 256;
/// Bytes of uploads in a batch: a batch of images and its labels. Larger uploads are submitted by themselves.
const BATCH_UPLOAD_BYTES: u64 = 1 << 20;
/// Larger uploads are submitted in chunks of this size: the driver holds a copy of a chunk until it is on the device.
const UPLOAD_CHUNK_BYTES: usize = 32 << 20;

/// A device, its queue, pipelines and pool. All clones and element types of a [`WebGpu`](super::WebGpu) share one.
pub(super) struct Gpu {
    pub(super) device: wgpu::Device,
    pub(super) queue: wgpu::Queue,
    /// The adapter's name.
    pub(super) name: String,
    /// The reason, once the device is lost.
    pub(super) lost: Arc<OnceLock<String>>,
    /// The side of the cooperative matrices of f16 that the device was opened with, or 0.
    pub(super) matrix: u32,
    pub(super) pool: Mutex<Pool>,
    pipelines: Mutex<HashMap<(Kernel, DType, u32), Pipeline>>,
    /// The file of compiled pipelines, if there is one.
    pub(super) cache: Option<Cache>,
    /// The folder for the text of each compiled shader: `LOWRANK_DUMP_SHADERS`.
    shaders: Option<PathBuf>,
    pub(super) batch: Mutex<Batch>,
    uniforms: wgpu::Buffer,
    uploads: wgpu::Buffer,
    counts: Mutex<Counts>,
}

/// Numbers of operations that a backend has requested of its device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Submissions of recorded commands.
    pub submissions: u64,
    /// Launches of shaders.
    pub launches: u64,
    /// Copies between buffers by copy commands.
    pub copies: u64,
    /// Copies from the host to a buffer.
    pub uploads: u64,
    /// Copies from a buffer to the host.
    pub downloads: u64,
    /// New buffers; those taken from the pool do not count.
    pub buffers: u64,
}

#[derive(Clone)]
struct Pipeline {
    pipeline: wgpu::ComputePipeline,
    layout: wgpu::BindGroupLayout,
}

/// Commands not yet submitted, with the uniforms of their launches and the bytes of their uploads.
#[derive(Default)]
pub(super) struct Batch {
    pub(super) commands: Vec<Command>,
    uniforms: Vec<u8>,
    uploads: Vec<u8>,
    work: u64,
}

pub(super) enum Command {
    Launch {
        pipeline: wgpu::ComputePipeline,
        operands: wgpu::BindGroup,
        uniforms: u32,
        grid: [u32; 2],
    },
    Clear(wgpu::Buffer),
    /// Copies bytes of a buffer to an offset in another buffer.
    Copy {
        from: wgpu::Buffer,
        bytes: Range<u64>,
        to: wgpu::Buffer,
        offset: u64,
    },
    /// Copies bytes of `uploads` to an offset in a buffer.
    Upload {
        bytes: Range<u64>,
        to: wgpu::Buffer,
        offset: u64,
    },
    /// Commands of the caller's.
    Record(Box<dyn Fn(&mut wgpu::CommandEncoder) + Send>),
    /// Writes a timestamp when all earlier commands are done.
    Stamp {
        queries: wgpu::QuerySet,
        index: u32,
    },
    /// Copies the timestamps to a buffer.
    Resolve {
        queries: wgpu::QuerySet,
        to: wgpu::Buffer,
    },
}

/// A binding: a range of bytes of a buffer.
pub(super) struct Binding<'a> {
    pub(super) buffer: &'a wgpu::Buffer,
    pub(super) bytes: Range<u64>,
}

impl<'a> Binding<'a> {
    /// The whole buffer.
    pub(super) fn all(buffer: &'a wgpu::Buffer) -> Self {
        Self { buffer, bytes: 0..buffer.size() }
    }

    pub(super) fn entry(&self, binding: u32) -> wgpu::BindGroupEntry<'a> {
        let (buffer, offset, size) = (self.buffer, self.bytes.start, wgpu::BufferSize::new(self.bytes.end - self.bytes.start));
        wgpu::BindGroupEntry { binding, resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding { buffer, offset, size }) }
    }
}

/// A launch. The operands are in the order of their bindings: first those that are read, then those that are written.
pub(super) struct Launch<'a> {
    pub(super) kernel: Kernel,
    pub(super) uniforms: &'a [u8],
    pub(super) operands: &'a [Binding<'a>],
    pub(super) grid: [u32; 2],
    /// Multiply-adds, or elements: a measure of the time it takes.
    pub(super) work: u64,
}

impl Gpu {
    /// Errors: the device has no memory for uniforms, or is lost.
    pub(super) fn new(device: wgpu::Device, queue: wgpu::Queue, name: String, matrix: u32) -> Result<Self> {
        let slot = u64::from(device.limits().min_uniform_buffer_offset_alignment).max(UNIFORM_BYTES);
        let buffer = |label, size, usage| {
            let usage = usage | wgpu::BufferUsages::COPY_DST;
            device.create_buffer(&wgpu::BufferDescriptor { label: Some(label), size, usage, mapped_at_creation: false })
        };
        let both = || {
            let uniforms = buffer("uniforms", BATCH_LAUNCHES * slot, wgpu::BufferUsages::UNIFORM);
            (uniforms, buffer("uploads", BATCH_UPLOAD_BYTES, wgpu::BufferUsages::COPY_SRC))
        };
        let (uniforms, uploads) = guarded(&device, BATCH_LAUNCHES * slot + BATCH_UPLOAD_BYTES, both)?;
        let (lost, pool, pipelines, cache, batch, counts) = Default::default();
        let shaders = std::env::var_os("LOWRANK_DUMP_SHADERS").filter(|folder| !folder.is_empty()).map(PathBuf::from);
        Ok(Self { device, queue, name, lost, matrix, pool, pipelines, cache, shaders, batch, uniforms, uploads, counts })
    }

    /// The numbers of operations so far.
    pub(super) fn counts(&self) -> Counts {
        *lock(&self.counts)
    }

    fn count(&self, counter: impl FnOnce(&mut Counts) -> &mut u64) {
        *counter(&mut lock(&self.counts)) += 1;
    }

    /// `Err` once the device is lost.
    fn check_not_lost(&self) -> Result<()> {
        self.lost.get().map_or(Ok(()), |reason| Err(failed(reason)))
    }

    /// Runs `work` and returns the errors that the driver reports.
    pub(super) fn guarded<T>(&self, bytes: u64, work: impl FnOnce() -> T) -> Result<T> {
        self.check_not_lost()?;
        guarded(&self.device, bytes, work)
    }

    /// Makes every later call return this error.
    fn mark_lost(&self, error: &Error) {
        self.lost.get_or_init(|| error.to_string());
    }

    /// True if a buffer with the usage `STORAGE` and at least four bytes belongs to this device. Tested by binding its last word,
    /// and, which must fail, the word after it: wgpu finds buffers by a number, which in another instance may be that of another
    /// buffer.
    pub(super) fn owns(&self, buffer: &wgpu::Buffer) -> Result<bool> {
        self.check_not_lost()?;
        let layout = self.guarded(0, || self.storage_layout())?;
        let alignment = u64::from(self.device.limits().min_storage_buffer_offset_alignment);
        let end = buffer.size() / 4 * 4;
        let first = (end - 1) / alignment * alignment;
        let binds = |end| {
            let entries = [Binding { buffer, bytes: first..end }.entry(0)];
            let group = wgpu::BindGroupDescriptor { label: None, layout: &layout, entries: &entries };
            // For an unknown number wgpu panics, in code that holds nothing of ours.
            let create = || catch_unwind(AssertUnwindSafe(|| drop(self.device.create_bind_group(&group))));
            guarded(&self.device, 0, create)
        };
        Ok(matches!(binds(end), Ok(Ok(()))) && binds(end + 4).is_err())
    }

    /// A layout with one read-only buffer.
    fn storage_layout(&self) -> wgpu::BindGroupLayout {
        let ty = wgpu::BufferBindingType::Storage { read_only: true };
        let entries = [layout_entry(0, ty)];
        self.device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: None, entries: &entries })
    }

    pub(super) fn create_buffer(&self, usage: wgpu::BufferUsages, size: u64) -> Result<wgpu::Buffer> {
        self.count(|counts| &mut counts.buffers);
        let buffer = wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false };
        self.guarded(size, || self.device.create_buffer(&buffer))
    }

    /// Records a launch.
    pub(super) fn launch(&self, elem: DType, threads: u32, launch: Launch<'_>) -> Result<()> {
        let Pipeline { pipeline, layout } = self.pipeline(launch.kernel, elem, threads)?;
        let operands = self.bind(&layout, launch.operands)?;
        self.count(|counts| &mut counts.launches);
        let mut batch = lock(&self.batch);
        let offset = batch.uniforms.len();
        debug_assert!(launch.uniforms.len() as u64 <= UNIFORM_BYTES);
        batch.uniforms.extend_from_slice(launch.uniforms);
        batch.uniforms.resize(offset + (self.uniforms.size() / BATCH_LAUNCHES) as usize, 0);
        batch.commands.push(Command::Launch { pipeline, operands, uniforms: offset as u32, grid: launch.grid });
        batch.work += launch.work;
        let full = batch.uniforms.len() as u64 == self.uniforms.size() || batch.work >= BATCH_WORK;
        if full { self.submit(&mut batch, None).map(drop) } else { Ok(()) }
    }

    /// Records a command that fills a buffer with zeros.
    pub(super) fn clear(&self, buffer: &wgpu::Buffer) -> Result<()> {
        lock(&self.batch).commands.push(Command::Clear(buffer.clone()));
        Ok(())
    }

    /// Records a copy between buffers. All numbers are multiples of four.
    pub(super) fn copy(&self, from: &wgpu::Buffer, bytes: Range<u64>, to: &wgpu::Buffer, offset: u64) -> Result<()> {
        self.count(|counts| &mut counts.copies);
        let (from, to) = (from.clone(), to.clone());
        lock(&self.batch).commands.push(Command::Copy { from, bytes, to, offset });
        Ok(())
    }

    /// Copies host memory to a buffer, after all recorded commands.
    pub(super) fn write(&self, buffer: &wgpu::Buffer, offset: u64, bytes: &[u8]) -> Result<()> {
        self.check_not_lost()?;
        let mut batch = lock(&self.batch);
        let (start, len) = (batch.uploads.len() as u64, bytes.len() as u64);
        if len == 0 {
            return Ok(());
        }
        self.count(|counts| &mut counts.uploads);
        if start + len <= BATCH_UPLOAD_BYTES {
            batch.uploads.extend_from_slice(bytes);
            batch.commands.push(Command::Upload { bytes: start..start + len, to: buffer.clone(), offset });
            return Ok(());
        }
        // A write of the queue comes before later submissions, so the recorded commands must be submitted first.
        if !batch.commands.is_empty() {
            self.submit(&mut batch, None)?;
        }
        let mut before = None;
        for (chunk, at) in bytes.chunks(UPLOAD_CHUNK_BYTES).zip((offset..).step_by(UPLOAD_CHUNK_BYTES)) {
            self.guarded(chunk.len() as u64, || self.queue.write_buffer(buffer, at, chunk))?;
            if let Some(before) = before.replace(self.submit(&mut batch, None)?) {
                self.wait(before)?;
            }
        }
        Ok(())
    }

    /// Copies a buffer to host memory, after all recorded commands, through a buffer that the host can map.
    pub(super) fn read(&self, from: &wgpu::Buffer, staging: &wgpu::Buffer, bytes: u64, host: &mut [u8]) -> Result<()> {
        self.count(|counts| &mut counts.downloads);
        let submitted = self.submit(&mut lock(&self.batch), Some((from, staging, bytes)))?;
        let (send, receive) = mpsc::channel();
        let slice = staging.slice(..bytes);
        self.guarded(0, || slice.map_async(wgpu::MapMode::Read, move |mapped| drop(send.send(mapped))))?;
        self.wait(submitted)?;
        // The callback may run in another thread's poll, a moment after this thread's poll has returned.
        receive.recv().map_err(failed)?.map_err(failed)?;
        host.copy_from_slice(&slice.get_mapped_range().map_err(failed)?[..host.len()]);
        staging.unmap();
        Ok(())
    }

    /// Waits until all recorded commands are done.
    pub(super) fn synchronize(&self) -> Result<()> {
        let submitted = self.submit(&mut lock(&self.batch), None)?;
        self.wait(submitted)
    }

    fn wait(&self, submitted: wgpu::SubmissionIndex) -> Result<()> {
        let wait = wgpu::PollType::Wait { submission_index: Some(submitted), timeout: None };
        // If the device is lost during the wait, wgpu panics, in code that holds nothing of ours.
        let polled = self.guarded(0, || catch_unwind(AssertUnwindSafe(|| self.device.poll(wait))))?;
        match polled {
            Ok(polled) => polled.map(drop).map_err(failed)?,
            Err(_) => self.mark_lost(&failed("the device was lost while it was waited for")),
        }
        self.check_not_lost()
    }

    /// Submits the recorded commands, and then a copy. If that fails, the commands of all threads are gone, and their outputs
    /// must not be read: the device counts as lost.
    fn submit(&self, batch: &mut Batch, copy: Option<(&wgpu::Buffer, &wgpu::Buffer, u64)>) -> Result<wgpu::SubmissionIndex> {
        let submitted = self.submit_all(std::mem::take(batch), copy);
        submitted.inspect_err(|error| self.mark_lost(error))
    }

    fn submit_all(&self, batch: Batch, copy: Option<(&wgpu::Buffer, &wgpu::Buffer, u64)>) -> Result<wgpu::SubmissionIndex> {
        let Batch { commands, uniforms, uploads, .. } = batch;
        self.count(|counts| &mut counts.submissions);
        self.guarded((uniforms.len() + uploads.len()) as u64, || {
            if !uniforms.is_empty() {
                self.queue.write_buffer(&self.uniforms, 0, &uniforms);
            }
            if !uploads.is_empty() {
                self.queue.write_buffer(&self.uploads, 0, &uploads);
            }
            let mut encoder = self.device.create_command_encoder(&Default::default());
            encode(&mut encoder, &commands, &self.uploads);
            if let Some((from, to, bytes)) = copy {
                encoder.copy_buffer_to_buffer(from, 0, to, 0, bytes);
            }
            self.queue.submit([encoder.finish()])
        })
    }

    fn pipeline(&self, kernel: Kernel, elem: DType, threads: u32) -> Result<Pipeline> {
        let key = (kernel, elem, threads);
        if let Some(pipeline) = lock(&self.pipelines).get(&key) {
            return Ok(pipeline.clone());
        }
        let source = kernel.source(elem, threads);
        if let Some(folder) = &self.shaders {
            std::fs::create_dir_all(folder).map_err(|error| file::failed(folder, error))?;
            file::write_whole(&folder.join(kernel.file_name(elem, threads)), source.as_bytes())?;
        }
        // No lock is held while compiling. If two threads compile the same kernel, the first result is used.
        let pipeline = self.guarded(0, || self.compile(kernel, &source))?;
        Ok(lock(&self.pipelines).entry(key).or_insert(pipeline).clone())
    }

    fn compile(&self, kernel: Kernel, source: &str) -> Pipeline {
        let label = Some(kernel.entry());
        let module = wgpu::ShaderModuleDescriptor { label, source: wgpu::ShaderSource::Wgsl(source.into()) };
        let module = self.device.create_shader_module(module);
        let layout = self.layout(kernel);
        let pipeline_layout = self.device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label,
            bind_group_layouts: &[Some(&layout)],
            immediate_size: 0,
        });
        let compilation_options =
            wgpu::PipelineCompilationOptions { zero_initialize_workgroup_memory: false, ..Default::default() };
        self.cache.iter().for_each(Cache::mark_stale);
        let pipeline = self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label,
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: label,
            compilation_options,
            cache: self.cache.as_ref().map(|cache| &cache.raw),
        });
        Pipeline { pipeline, layout }
    }

    /// Binding 0: uniforms; then read-only operands, then those that are written.
    fn layout(&self, kernel: Kernel) -> wgpu::BindGroupLayout {
        let (reads, writes) = kernel.bindings();
        let storage = |binding| layout_entry(binding, wgpu::BufferBindingType::Storage { read_only: binding <= reads });
        let uniforms = layout_entry(0, wgpu::BufferBindingType::Uniform);
        let entries: Vec<_> = std::iter::once(uniforms).chain((1..=reads + writes).map(storage)).collect();
        self.device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: None, entries: &entries })
    }

    fn bind(&self, layout: &wgpu::BindGroupLayout, operands: &[Binding<'_>]) -> Result<wgpu::BindGroup> {
        let uniforms = Binding { buffer: &self.uniforms, bytes: 0..UNIFORM_BYTES };
        let bindings = std::iter::once(&uniforms).chain(operands).zip(0..);
        let entries: Vec<_> = bindings.map(|(binding, number)| binding.entry(number)).collect();
        let group = wgpu::BindGroupDescriptor { label: None, layout, entries: &entries };
        self.guarded(0, || self.device.create_bind_group(&group))
    }
}

/// Each launch has its own range of the uniform buffer.
fn layout_entry(binding: u32, ty: wgpu::BufferBindingType) -> wgpu::BindGroupLayoutEntry {
    let has_dynamic_offset = ty == wgpu::BufferBindingType::Uniform;
    wgpu::BindGroupLayoutEntry {
        binding,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset, min_binding_size: None },
        count: None,
    }
}

/// Runs `work` and returns the errors that the driver reports, which would otherwise end the program.
fn guarded<T>(device: &wgpu::Device, bytes: u64, work: impl FnOnce() -> T) -> Result<T> {
    let filters = [wgpu::ErrorFilter::OutOfMemory, wgpu::ErrorFilter::Internal, wgpu::ErrorFilter::Validation];
    let [memory, internal, validation] = filters.map(|filter| device.push_error_scope(filter));
    let value = work();
    let [validation, internal] = [validation, internal].map(|scope| pollster::block_on(scope.pop()));
    let memory = pollster::block_on(memory.pop());
    match (memory, validation.or(internal)) {
        (Some(_), _) => Err(Error::OutOfMemory { backend: "webgpu", bytes: bytes as usize }),
        (None, Some(error)) => Err(failed(error)),
        (None, None) => Ok(value),
    }
}

/// Consecutive launches share a compute pass.
fn encode(encoder: &mut wgpu::CommandEncoder, commands: &[Command], uploads: &wgpu::Buffer) {
    for run in commands.chunk_by(|one, next| matches!((one, next), (Command::Launch { .. }, Command::Launch { .. }))) {
        match run {
            [Command::Clear(buffer)] => {
                encoder.clear_buffer(buffer, 0, None);
                continue;
            }
            [Command::Copy { from, bytes: Range { start, end }, to, offset }] => {
                encoder.copy_buffer_to_buffer(from, *start, to, *offset, end - start);
                continue;
            }
            [Command::Upload { bytes: Range { start, end }, to, offset }] => {
                encoder.copy_buffer_to_buffer(uploads, *start, to, *offset, end - start);
                continue;
            }
            [Command::Record(commands)] => {
                commands(encoder);
                continue;
            }
            [Command::Stamp { queries, index }] => {
                encoder.write_timestamp(queries, *index);
                continue;
            }
            [Command::Resolve { queries, to }] => {
                encoder.resolve_query_set(queries, 0..2, to, 0);
                continue;
            }
            _ => {}
        }
        let mut pass = encoder.begin_compute_pass(&Default::default());
        for command in run {
            let Command::Launch { pipeline, operands, uniforms, grid: [x, y] } = command else { continue };
            pass.set_pipeline(pipeline);
            pass.set_bind_group(0, operands, &[*uniforms]);
            pass.dispatch_workgroups(*x, *y, 1);
        }
    }
}

fn failed(error: impl ToString) -> Error {
    Error::Device { backend: "webgpu", reason: error.to_string() }
}
