//! The CPU: SIMD chosen at run time, rayon over blocks of the output.
//!
//! ```text
//! lora.rs linear.rs      a verb, as the sums of products it is
//! segments.rs           the low-rank layer where each row has an adapter of its own
//!   └─ gemm/             the engine: out = init + Σ scale·lhs·rhs, blocked, skinny or shallow
//!        └─ simd/        sixteen lanes on any vector unit
//! pointwise.rs dora.rs adam.rs   one pass over memory
//! ```
//!
//! Work is split over blocks of the output and never along a sum, so the bits do not depend on the number of threads.

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
mod segments;
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

/// The CPU as a backend whose weights and activations are stored as `E`.
///
/// Clones share the threads, and the memory: what a dropped tensor or a verb's work lay in is kept for the next of its size, at
/// most as much as is in use, or 256 MiB; where the system has no room, it gets that back.
#[derive(Clone)]
pub struct Cpu<E: Float> {
    unit: Unit,
    caches: Caches,
    verbs: &'static Verbs<E>,
    threads: Option<Arc<rayon::ThreadPool>>,
    pool: Arc<Pool>,
    scratch: Arc<Scratch>,
}

/// What computes: a vector unit with its caches, memory to work in, and whether this thread does all of it.
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
    /// The best vector unit of this CPU, on the threads of the rayon pool that a verb is called from; called from elsewhere, on
    /// rayon's global ones.
    ///
    /// `LOWRANK_UNIT` (`amx`, `avx512-bf16`, `avx512`, `avx2`, `neon`, `scalar`, `amx-emulated`) asks for another unit. Errors:
    /// [`Error::Value`] if it names none, [`Error::Unavailable`] if this CPU does not have it.
    ///
    /// `LOWRANK_CACHES` says how large the caches of a core are, L1d, L2 and L3, where a virtual machine tells otherwise: `32K,512K,32M`.
    /// It changes how products are cut into blocks, and no bit of them. Errors: [`Error::Value`] if it is not three sizes.
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

    /// With another vector unit. Errors: [`Error::Unavailable`] if this CPU does not have it.
    pub fn with_unit(mut self, unit: VectorUnit) -> Result<Self> {
        self.unit = Unit::new(unit)?;
        Ok(self)
    }

    /// With `threads` threads of its own. Errors: [`Error::Value`] for none, [`Error::Device`] if they cannot be started.
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

    /// How `y = x·Wᵀ` is computed, `x m×k`, `W n×k`: the loop nest and its blocks, and the caches that they were made for. For people to
    /// read: the words may change.
    pub fn explain(&self, m: usize, k: usize, n: usize) -> String {
        format!("{} ({}; {})", gemm::explain::<E>(&self.engine(true), m, k, n), self.unit().name(), self.caches)
    }

    /// How many threads share the work.
    pub fn threads(&self) -> usize {
        self.threads.as_ref().map_or_else(rayon::current_num_threads, |pool| pool.current_num_threads())
    }

    fn engine(&self, sequential: bool) -> Engine<'_> {
        Engine { unit: self.unit, caches: self.caches, pool: &self.pool, scratch: &self.scratch, sequential }
    }

    /// Runs a verb, whose loops then use this backend's threads; if it is little work, here, and no loop uses another thread.
    fn run<R: Request>(&self, verb: fn(&Engine<'_>, R) -> Result<()>, op: Checked<R>) -> Result<()> {
        if op.is_small() {
            return verb(&self.engine(true), op.into_inner());
        }
        self.on_threads(|| verb(&self.engine(false), op.into_inner()))
    }

    /// Handed over once, where each loop would be by itself.
    fn on_threads<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        match &self.threads {
            Some(pool) => pool.install(work),
            None => rayon::scope(|_| work()),
        }
    }
}

impl<E: Float, T: Element> Tensor<Cpu<E>, T> {
    /// A vector as a tensor, row by row; it becomes the tensor's memory, and [`into_vec`](Self::into_vec) gives it back.
    ///
    /// Errors: [`Error::Value`] if its length is not `rows · cols`.
    ///
    /// ```
    /// use lowrank::{Cpu, Tensor};
    ///
    /// let vec = vec![1.0f32, 2.0, 3.0, 4.0];
    /// let at = vec.as_ptr();
    /// let tensor = Tensor::<Cpu<f32>>::from_vec((2, 2), vec)?;
    /// assert_eq!(tensor.into_vec().as_ptr(), at); // nothing was copied
    /// # Ok::<(), lowrank::Error>(())
    /// ```
    pub fn from_vec(shape: impl Into<Shape>, vec: Vec<T>) -> Result<Self> {
        Self::from_buffer(shape, Buffer::from(vec))
    }

    /// The elements, row by row: the vector that the tensor was made of, or a copy of memory from the pool.
    pub fn into_vec(self) -> Vec<T> {
        self.into_buffer().into()
    }
}

impl<'a, E: Float, T: Element> MatRef<'a, Cpu<E>, T> {
    /// Memory of the caller's as a matrix, row after row. Errors: [`Error::Value`] if it does not hold `rows · cols` elements.
    pub fn from_slice(slice: &'a [T], shape: impl Into<Shape>) -> Result<Self> {
        Self::new(slice, shape)
    }
}

impl<'a, E: Float, T: Element> MatMut<'a, Cpu<E>, T> {
    /// Memory of the caller's as a matrix, row after row. Errors: [`Error::Value`] if it does not hold `rows · cols` elements.
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
        Ok(()) // verbs return when they are done
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
        let rows = to.into_memory()[span].chunks_mut(stride.max(1)); // at least as long as a row
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
        w.buffer_mut().keep(packed);
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
            let (wide, narrow) = (products::<f32>("32K,512K,32M", m, k), products::<bf16>("32K,512K,32M", m, k));
            for caches in ["4K,4K,4K", "32K,256K,8M", "48K,2M,30M", "128K,12M,12M"] {
                assert!(products::<f32>(caches, m, k) == wide && products::<bf16>(caches, m, k) == narrow, "{caches}, {m}×{k}");
            }
        }
    }
}
