//! The CPU backend: SIMD chosen at run time, and rayon over blocks of the output.
//!
//! ```text
//! lora.rs linear.rs              verbs as sums of products
//!   └─ gemm/                     the engine: out = init + Σ scale·lhs·rhs
//!        └─ simd/                vectors of sixteen lanes on any vector unit
//! pointwise.rs dora.rs adam.rs   verbs that pass over memory once
//! ```
//!
//! Work is split over blocks of the output, never along the depth of a sum, so the bits do not depend on the number of threads.

mod adam;
mod buffer;
mod caches;
mod dora;
mod gemm;
mod linear;
mod lora;
mod pointwise;
mod pool;
mod scratch;
mod simd;
mod small_work;
mod tasks;
mod verbs;

use std::fmt;
use std::sync::Arc;

pub use buffer::Buffer;
use caches::Caches;
pub use gemm::PackedWeight;
use pool::Pool;
use scratch::Scratch;
use simd::Unit;
pub use simd::VectorUnit;
use small_work::Request;
use verbs::Verbs;

use super::{Backend, Passes};
use crate::element::{Element, Float};
use crate::error::{Error, Result};
use crate::op::{
    Accumulate, Adam, Add, Checked, CrossEntropy, DropoutForward, LinearBackward, LinearForward, LoraBackward, LoraForward,
    LoraMerge, LoraRowNorm, Magnitude, MagnitudeBackward, Relu, ReluBackward,
};
use crate::tensor::{Shape, Tensor};
use crate::view::{MatMut, MatRef};

/// The CPU backend, with weights and activations of element type `E`.
///
/// Clones share the threads and the memory pool. The pool holds freed buffers for the next allocation of the same size, at most
/// as many bytes as are in use or 256 MiB, whichever is more. If the system is out of memory, the pool is freed.
#[derive(Clone)]
pub struct Cpu<E: Float> {
    unit: Unit,
    caches: Caches,
    verbs: &'static Verbs<E>,
    threads: Option<Arc<rayon::ThreadPool>>,
    pool: Arc<Pool>,
    scratch: Arc<Scratch>,
}

/// The means of one call: the vector unit, the cache sizes, memory, and whether to use one thread (`sequential`).
#[derive(Clone, Copy)]
struct Engine<'c> {
    unit: Unit,
    caches: Caches,
    pool: &'c Arc<Pool>,
    scratch: &'c Scratch,
    sequential: bool,
}

impl<E: Float> fmt::Debug for Cpu<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cpu<{}>({}, {} threads)", E::DTYPE, self.unit().name(), self.threads())
    }
}

impl<E: Float> Cpu<E> {
    /// A backend with the best vector unit of this CPU. Its verbs use the threads of the rayon pool that they are called from,
    /// or of rayon's global pool.
    ///
    /// The environment variable `LOWRANK_UNIT` chooses another unit: `amx`, `avx512-bf16`, `avx512`, `avx2`, `neon`, `scalar` or
    /// `amx-emulated`. Errors: [`Error::Value`] for another name, [`Error::Unavailable`] if this CPU does not have the unit.
    ///
    /// The environment variable `LOWRANK_CACHES` overrides the detected sizes of L1d, L2 and L3 of a core, such as
    /// `32K,512K,32M`, since some virtual machines report wrong ones. They change the block sizes of products, and no result.
    /// Errors: [`Error::Value`] if it is not three sizes.
    pub fn new() -> Result<Self> {
        let unit = match std::env::var_os("LOWRANK_UNIT") {
            Some(name) => VectorUnit::from_name(&name.to_string_lossy())?,
            None => VectorUnit::best(),
        };
        let pool: Arc<Pool> = Arc::default();
        let scratch = Arc::new(Scratch::new(pool.clone()));
        let caches = Caches::new()?;
        Ok(Self { unit: Unit::new(unit)?, caches, verbs: Verbs::of()?, threads: None, pool, scratch })
    }

    /// Uses another vector unit. Errors: [`Error::Unavailable`] if this CPU does not have it.
    pub fn with_unit(mut self, unit: VectorUnit) -> Result<Self> {
        self.unit = Unit::new(unit)?;
        Ok(self)
    }

    /// Uses a thread pool of its own, of `threads` threads. Errors: [`Error::Value`] for 0, [`Error::Device`] if they cannot be
    /// started.
    pub fn with_threads(self, threads: usize) -> Result<Self> {
        Error::unless(threads > 0, "cpu", "threads", threads, "at least 1")?;
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        let pool = pool.map_err(|error| Error::Device { backend: "cpu", reason: error.to_string() })?;
        Ok(Self { threads: Some(Arc::new(pool)), ..self })
    }

    /// The vector unit in use.
    pub fn unit(&self) -> VectorUnit {
        self.unit.name()
    }

    /// Describes how `y = x·Wᵀ`, `x m×k`, `W n×k`, is computed: the regime, the block sizes, and the cache sizes that they were
    /// chosen for. The text is for people and may change.
    pub fn explain(&self, m: usize, k: usize, n: usize) -> String {
        format!("{} ({}; {})", gemm::explain::<E>(&self.engine(true), m, k, n), self.unit().name(), self.caches)
    }

    /// Number of threads that verbs use.
    pub fn threads(&self) -> usize {
        self.threads.as_ref().map_or_else(rayon::current_num_threads, |pool| pool.current_num_threads())
    }

    fn engine(&self, sequential: bool) -> Engine<'_> {
        Engine { unit: self.unit, caches: self.caches, pool: &self.pool, scratch: &self.scratch, sequential }
    }

    /// Runs a verb on this backend's threads, or on the calling thread alone if it is small work.
    fn run<R: Request>(&self, verb: fn(&Engine<'_>, R) -> Result<()>, op: Checked<R>) -> Result<()> {
        if op.is_small() {
            return verb(&self.engine(true), op.into_inner());
        }
        self.on_threads(|| verb(&self.engine(false), op.into_inner()))
    }

    /// Runs `work` within the thread pool. Entering the pool once for a verb is cheaper than once for each of its loops.
    fn on_threads<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        match &self.threads {
            Some(pool) => pool.install(work),
            None => rayon::scope(|_| work()),
        }
    }
}

impl<E: Float, T: Element> Tensor<Cpu<E>, T> {
    /// A tensor whose memory is `vec`, row by row. Nothing is copied; [`into_vec`](Self::into_vec) returns the vector.
    ///
    /// Errors: [`Error::Value`] if its length is not `rows · cols`.
    ///
    /// ```
    /// use lowrank::{Cpu, Tensor};
    ///
    /// let vec = vec![1.0f32, 2.0, 3.0, 4.0];
    /// let address = vec.as_ptr();
    /// let tensor = Tensor::<Cpu<f32>>::from_vec((2, 2), vec)?;
    /// assert_eq!(tensor.into_vec().as_ptr(), address); // nothing was copied
    /// # Ok::<(), lowrank::Error>(())
    /// ```
    pub fn from_vec(shape: impl Into<Shape>, vec: Vec<T>) -> Result<Self> {
        Self::from_buffer(shape, Buffer::from(vec))
    }

    /// The elements, row by row: the vector of [`from_vec`](Self::from_vec), or a copy if the memory belongs to the pool.
    pub fn into_vec(self) -> Vec<T> {
        self.into_buffer().into()
    }
}

impl<'a, E: Float, T: Element> MatRef<'a, Cpu<E>, T> {
    /// A contiguous matrix in memory of the caller. Errors: [`Error::Value`] if the length of `slice` is not `rows · cols`.
    pub fn from_slice(slice: &'a [T], shape: impl Into<Shape>) -> Result<Self> {
        Self::new(slice, shape)
    }
}

impl<'a, E: Float, T: Element> MatMut<'a, Cpu<E>, T> {
    /// A contiguous matrix in memory of the caller. Errors: [`Error::Value`] if the length of `slice` is not `rows · cols`.
    pub fn from_slice(slice: &'a mut [T], shape: impl Into<Shape>) -> Result<Self> {
        Self::new(slice, shape)
    }
}

impl<E: Float> super::sealed::Sealed for Cpu<E> {}

impl<E: Float> Backend for Cpu<E> {
    type Elem = E;
    type Buffer<T: Element> = Buffer<T>;
    type Slice<T: Element> = [T];
    type Panels = PackedWeight;

    fn device(&self) -> String {
        format!("cpu ({}, {} threads)", self.unit().name(), self.threads())
    }

    fn zeros<T: Element>(&self, len: usize) -> Result<Buffer<T>> {
        Buffer::zeros(&self.pool, len)
    }

    fn unwritten<T: Element>(&self, len: usize) -> Result<Buffer<T>> {
        Buffer::unwritten(&self.pool, len)
    }

    fn upload<T: Element>(&self, host: &[T]) -> Result<Buffer<T>> {
        let mut buffer = Buffer::unwritten(&self.pool, host.len())?;
        buffer.copy_from_slice(host);
        Ok(buffer)
    }

    fn write<T: Element>(&self, buffer: &mut Buffer<T>, host: &[T]) -> Result<()> {
        Error::unless(host.len() == buffer.len(), "write", "host", host.len(), "as many elements as the buffer")?;
        buffer.copy_from_slice(host);
        Ok(())
    }

    fn download<T: Element>(&self, buffer: &Buffer<T>, host: &mut [T]) -> Result<()> {
        Error::unless(host.len() == buffer.len(), "download", "host", host.len(), "as many elements as the buffer")?;
        host.copy_from_slice(buffer);
        Ok(())
    }

    fn synchronize(&self) -> Result<()> {
        Ok(()) // verbs are done when they return
    }

    fn slice<T: Element>(buffer: &Buffer<T>) -> &[T] {
        buffer
    }

    fn slice_mut<T: Element>(buffer: &mut Buffer<T>) -> &mut [T] {
        buffer
    }

    fn slice_len<T: Element>(slice: &[T]) -> usize {
        slice.len()
    }

    fn copy<T: Element>(&self, from: MatRef<'_, Self, T>, to: MatMut<'_, Self, T>) -> Result<()> {
        let (from, cols, stride, span) = (linear::matrix(from), to.cols(), to.row_stride(), to.span());
        let rows = to.into_memory()[span].chunks_mut(stride.max(1)); // each at least `cols` long
        from.runs().zip(rows).for_each(|(from, to)| to[..cols].copy_from_slice(from));
        Ok(())
    }

    fn pack(&self, w: MatRef<'_, Self>, passes: Passes) -> Result<PackedWeight> {
        self.on_threads(|| (self.verbs.pack)(&self.engine(false), w, passes == Passes::ForwardAndBackward))
    }

    fn panels(buffer: &Buffer<E>) -> Option<&PackedWeight> {
        buffer.packed()
    }

    fn keep_packed(&self, w: &mut Tensor<Self>, passes: Passes) -> Result<()> {
        let packed = self.pack(w.view(), passes)?;
        w.buffer_mut().set_packed(packed);
        Ok(())
    }

    fn lora_forward(&self, op: Checked<LoraForward<'_, Self>>) -> Result<()> {
        self.run(self.verbs.lora_forward, op)
    }
    fn lora_backward(&self, op: Checked<LoraBackward<'_, Self>>) -> Result<()> {
        self.run(self.verbs.lora_backward, op)
    }
    fn lora_merge(&self, op: Checked<LoraMerge<'_, Self>>) -> Result<()> {
        self.run(self.verbs.lora_merge, op)
    }
    fn lora_row_norm(&self, op: Checked<LoraRowNorm<'_, Self>>) -> Result<()> {
        self.run(self.verbs.lora_row_norm, op)
    }
    fn magnitude(&self, op: Checked<Magnitude<'_, Self>>) -> Result<()> {
        self.run(self.verbs.magnitude, op)
    }
    fn magnitude_backward(&self, op: Checked<MagnitudeBackward<'_, Self>>) -> Result<()> {
        self.run(self.verbs.magnitude_backward, op)
    }
    fn linear_forward(&self, op: Checked<LinearForward<'_, Self>>) -> Result<()> {
        self.run(self.verbs.linear_forward, op)
    }
    fn linear_backward(&self, op: Checked<LinearBackward<'_, Self>>) -> Result<()> {
        self.run(self.verbs.linear_backward, op)
    }
    fn relu(&self, op: Checked<Relu<'_, Self>>) -> Result<()> {
        self.run(self.verbs.relu, op)
    }
    fn relu_backward(&self, op: Checked<ReluBackward<'_, Self>>) -> Result<()> {
        self.run(self.verbs.relu_backward, op)
    }
    fn dropout_forward(&self, op: Checked<DropoutForward<'_, Self>>) -> Result<()> {
        self.run(self.verbs.dropout_forward, op)
    }
    fn add(&self, op: Checked<Add<'_, Self>>) -> Result<()> {
        self.run(self.verbs.add, op)
    }
    fn accumulate(&self, op: Checked<Accumulate<'_, Self>>) -> Result<()> {
        self.run(self.verbs.accumulate, op)
    }
    fn cross_entropy(&self, op: Checked<CrossEntropy<'_, Self>>) -> Result<()> {
        self.run(self.verbs.cross_entropy, op)
    }
    fn adam(&self, op: Checked<Adam<'_, Self>>) -> Result<()> {
        self.run(self.verbs.adam, op)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::element::bf16;
    use crate::random::Rng;

    /// `x·Wᵀ` and `x·W` with these caches.
    fn products<E: Float>(caches: &str, m: usize, k: usize) -> Vec<f32> {
        let mut cpu = Cpu::<E>::new().unwrap();
        cpu.caches = Caches::parse(caches).unwrap();
        let mut rng = Rng::new(1);
        let mut random = |rows, cols| {
            let numbers: Vec<E> = (0..rows * cols).map(|_| E::from_f32(rng.unit() as f32 - 0.5)).collect();
            Tensor::from_slice(&cpu, (rows, cols), &numbers).unwrap()
        };
        let (x, w) = (random(m, k), random(k, k));
        let (mut y, mut dx) = (random(m, k), random(m, k));
        let forward = LinearForward { x: x.view(), w: (&w).into(), bias: None, y: (&mut y).into() };
        cpu.linear_forward(forward.check().unwrap()).unwrap();
        let dx_of =
            LinearBackward { x: None, w: Some((&w).into()), dy: y.view(), dx: Some((&mut dx).into()), dw: None, dbias: None };
        cpu.linear_backward(dx_of.check().unwrap()).unwrap();
        y.buffer().iter().chain(dx.buffer().iter()).map(|number| number.to_f32()).collect()
    }

    #[test]
    fn caches_change_no_bit() {
        for (m, k) in [(7, 40), (31, 130), (150, 610)] {
            let (f32s, bf16s) = (products::<f32>("32K,512K,32M", m, k), products::<bf16>("32K,512K,32M", m, k));
            for caches in ["4K,4K,4K", "32K,256K,8M", "48K,2M,30M", "128K,12M,12M"] {
                assert!(products::<f32>(caches, m, k) == f32s && products::<bf16>(caches, m, k) == bf16s, "{caches}, {m}×{k}");
            }
        }
    }
}
