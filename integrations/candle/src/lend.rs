//! candle's memory as lowrank's operands: lent for as long as a call lasts, never copied.

use std::sync::{Mutex, OnceLock, PoisonError};

use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Result, Storage, StorageRef, Tensor, WithDType, bail};
use half::{bf16, f16};
use lowrank::{Cpu, Float, MatMut, MatRef};

/// The element types that both candle and lowrank compute with: `f32`, `f16`, `bf16`.
pub(crate) trait Elem: Float + WithDType {
    /// The backend of this type. It runs on rayon's global threads, as candle's products do.
    fn cpu() -> Result<&'static Cpu<Self>>;

    /// The elements of memory of this type, to be written.
    fn elements_mut(storage: &mut CpuStorage) -> Result<&mut [Self]>;
}

macro_rules! elem {
    ($($type:ty, $variant:ident);*) => {$(
        impl Elem for $type {
            fn cpu() -> Result<&'static Cpu<Self>> {
                static CPU: OnceLock<Cpu<$type>> = OnceLock::new();
                if CPU.get().is_none() {
                    let _ = CPU.set(Cpu::new().map_err(wrapped)?); // another thread may have been first
                }
                CPU.get().ok_or_else(|| candle_core::Error::msg("the CPU backend is gone"))
            }

            fn elements_mut(storage: &mut CpuStorage) -> Result<&mut [Self]> {
                match storage {
                    CpuStorage::$variant(elements) => Ok(elements),
                    _ => bail!("a tensor is not of the type {}", stringify!($type)),
                }
            }
        }
    )*};
}

elem!(f32, F32; f16, F16; bf16, BF16);

/// Runs the body with `$E` as the Rust type of a candle type.
macro_rules! by_dtype {
    ($dtype:expr, $E:ident => $body:expr) => {
        match $dtype {
            candle_core::DType::F32 => {
                type $E = f32;
                $body
            }
            candle_core::DType::F16 => {
                type $E = half::f16;
                $body
            }
            candle_core::DType::BF16 => {
                type $E = half::bf16;
                $body
            }
            other => Err($crate::lend::unsupported(other).into()),
        }
    };
}
pub(crate) use by_dtype;

/// The error for an element type that lowrank does not compute with.
pub(crate) fn unsupported(dtype: DType) -> candle_core::Error {
    candle_core::Error::msg(format!("lowrank computes in f32, f16 and bf16, not in {}", dtype.as_str()))
}

/// An error of lowrank's as one of candle's.
pub(crate) fn wrapped(error: lowrank::Error) -> candle_core::Error {
    candle_core::Error::wrap(error)
}

/// Runs work on one of rayon's threads. Its verbs then need not hand themselves over to one, each by itself.
pub(crate) fn on_threads<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    rayon::scope(|_| work())
}

/// The elements of contiguous memory.
pub(crate) fn lend<'s, T: WithDType>(storage: &'s CpuStorage, layout: &Layout) -> Result<&'s [T]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<T>()?[start..end]),
        None => bail!("an operand of a custom operation is not contiguous: call `contiguous` on it"),
    }
}

/// Rows × columns of an operand whose last dimension are the columns.
pub(crate) fn rows_and_columns(layout: &Layout) -> (usize, usize) {
    let columns = layout.dims().last().copied().unwrap_or(1);
    (layout.shape().elem_count() / columns.max(1), columns)
}

/// A tensor in the memory of the CPU, locked for reading.
pub(crate) struct Lent<'t> {
    storage: StorageRef<'t>,
    layout: &'t Layout,
}

impl<'t> Lent<'t> {
    /// Locks the tensor's memory.
    pub(crate) fn new(tensor: &'t Tensor) -> Self {
        let (storage, layout) = tensor.storage_and_layout();
        Self { storage, layout }
    }

    /// The elements. Errors: if the tensor is not contiguous, not in the CPU's memory, or of another type.
    pub(crate) fn slice<T: WithDType>(&self) -> Result<&[T]> {
        match &*self.storage {
            Storage::Cpu(storage) => lend(storage, self.layout),
            _ => bail!("lowrank-candle computes on the CPU: load the model there"),
        }
    }
}

/// A matrix in lent memory.
pub(crate) fn matrix<E: Float, T: lowrank::Element>(slice: &[T], shape: (usize, usize)) -> Result<MatRef<'_, Cpu<E>, T>> {
    MatRef::from_slice(slice, shape).map_err(wrapped)
}

/// A matrix in memory lent to be written.
pub(crate) fn matrix_mut<E: Float, T: lowrank::Element>(slice: &mut [T], shape: (usize, usize)) -> Result<MatMut<'_, Cpu<E>, T>> {
    MatMut::from_slice(slice, shape).map_err(wrapped)
}

/// Writes to the elements of a tensor where they lie; all tensors that share its memory see it.
///
/// Errors: if the tensor is not contiguous, not in the CPU's memory, or of another type; those of the work.
pub(crate) fn write<E: Elem, R>(tensor: &Tensor, work: impl FnOnce(&mut [E]) -> Result<R>) -> Result<R> {
    let write = Write { work: Mutex::new(Some(work)), result: Mutex::new(None), of: std::marker::PhantomData::<E> };
    tensor.inplace_op1(&write)?;
    let result = write.result.into_inner().unwrap_or_else(PoisonError::into_inner);
    result.ok_or_else(|| candle_core::Error::msg("a tensor was not written"))
}

struct Write<E, R, F> {
    work: Mutex<Option<F>>,
    result: Mutex<Option<R>>,
    of: std::marker::PhantomData<E>,
}

impl<E: Elem, R, F: FnOnce(&mut [E]) -> Result<R>> InplaceOp1 for Write<E, R, F> {
    fn name(&self) -> &'static str {
        "lowrank-write"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let Some((start, end)) = layout.contiguous_offsets() else { bail!("a tensor to be written is not contiguous") };
        let work = self.work.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(work) = work {
            let result = work(&mut E::elements_mut(storage)?[start..end])?;
            *self.result.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
        }
        Ok(())
    }
}
