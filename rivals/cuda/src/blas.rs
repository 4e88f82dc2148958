//! cuBLAS's product, for row-major matrices. Sums in true f32: no TF32.
#![allow(unsafe_code, reason = "cuBLAS takes pointers")]

use std::error::Error;
use std::ffi::c_void;
use std::sync::Arc;

use cudarc::cublas::sys::{cublasComputeType_t, cublasGemmAlgo_t, cublasOperation_t, cudaDataType};
use cudarc::cublas::{CudaBlas, result, sys};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use lowrank::DType;

/// A handle on a stream.
pub struct Blas {
    blas: CudaBlas,
    stream: Arc<CudaStream>,
    element: cudaDataType,
}

/// An operand: memory, and whether it is used transposed.
#[derive(Clone, Copy)]
pub struct Operand<'m>(pub &'m CudaSlice<u8>, pub bool);

impl Blas {
    /// Err if the library is not there.
    pub fn new(stream: Arc<CudaStream>, dtype: DType) -> Result<Self, Box<dyn Error>> {
        // SAFETY: looking for the library, and loading it.
        if !unsafe { sys::is_culib_present() } {
            return Err("cuBLAS is not installed".into());
        }
        let element = match dtype {
            DType::F32 => cudaDataType::CUDA_R_32F,
            DType::F16 => cudaDataType::CUDA_R_16F,
            DType::BF16 => cudaDataType::CUDA_R_16BF,
        };
        Ok(Self { blas: CudaBlas::new(stream.clone())?, stream, element })
    }

    /// `out = alpha·lhs·rhs + beta·out`, of `m×n` and depth `k`; the operands are stored as `m×k` and `k×n`, or transposed.
    pub fn multiply(
        &self,
        [m, n, k]: [usize; 3],
        alpha: f32,
        [lhs, rhs]: [Operand<'_>; 2],
        beta: f32,
        out: &mut CudaSlice<u8>,
    ) -> Result<(), Box<dyn Error>> {
        let size = if self.element == cudaDataType::CUDA_R_32F { 4 } else { 2 };
        assert!(
            lhs.0.len() >= m * k * size && rhs.0.len() >= k * n * size && out.len() >= m * n * size,
            "operands are too short"
        );
        // cuBLAS counts along columns: what it sees are the transposed matrices, so the operands change places.
        let op =
            |Operand(_, transposed)| [cublasOperation_t::CUBLAS_OP_N, cublasOperation_t::CUBLAS_OP_T][usize::from(transposed)];
        let line = |transposed: bool, stored: usize, else_: usize| if transposed { stored } else { else_ } as i32;
        let (left, right) = (lhs.0.device_ptr(&self.stream), rhs.0.device_ptr(&self.stream));
        let to = out.device_ptr_mut(&self.stream);
        let (alpha, beta): (*const f32, *const f32) = (&alpha, &beta);
        // SAFETY: the pointers are of memory as long as the sizes say, and the scalars live until the call returns.
        unsafe {
            result::gemm_ex(
                *self.blas.handle(),
                op(rhs),
                op(lhs),
                n as i32,
                m as i32,
                k as i32,
                alpha.cast::<c_void>(),
                right.0 as *const c_void,
                self.element,
                line(rhs.1, k, n),
                left.0 as *const c_void,
                self.element,
                line(lhs.1, m, k),
                beta.cast::<c_void>(),
                to.0 as *mut c_void,
                self.element,
                n as i32,
                cublasComputeType_t::CUBLAS_COMPUTE_32F,
                cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )?;
        }
        Ok(())
    }
}
