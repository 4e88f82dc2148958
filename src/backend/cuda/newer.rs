//! Driver functions of CUDA 11.8 and 12.0, looked up by name: overlapping launches, and tensor maps.
//!
//! cudarc has them only if it is built for such a version. That version is chosen by the application, or by the `nvcc` on the
//! PATH; if this crate required one, other crates could not choose another.
#![allow(unsafe_code, reason = "functions of the driver by their names: their types are what its documentation says")]

use std::ffi::c_void;
use std::sync::OnceLock;

use cudarc::driver::DriverError;
use cudarc::driver::sys::{CUdeviceptr, CUfunction, CUresult, CUstream};
use libloading::Library;

use super::device::Tiles;
use super::plan::Plan;

/// NVIDIA's driver library. It is never unloaded, so its functions may be called as long as the program runs. `Err` says why it
/// is not available.
pub(super) fn library() -> Result<&'static Library, &'static str> {
    static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();
    LIBRARY.get_or_init(load).as_ref().map_err(String::as_str)
}

fn load() -> Result<Library, String> {
    let names = if cfg!(windows) { &["nvcuda.dll"][..] } else { &["libcuda.so.1", "libcuda.so"][..] };
    let mut reason = String::new();
    for name in names {
        // SAFETY: loading NVIDIA's driver library only initialises the library.
        match unsafe { Library::new(*name) } {
            Ok(library) => return Ok(library),
            Err(error) => reason = format!("no NVIDIA driver: {error}"),
        }
    }
    Err(reason)
}

/// Errors: the reason, if NCCL's library cannot be loaded; cudarc, which loads it later, would panic. It is never unloaded.
#[cfg(feature = "nccl")]
pub(crate) fn nccl_is_installed() -> Result<(), String> {
    static LIBRARY: OnceLock<Option<Library>> = OnceLock::new();
    let load = || {
        let name = if cfg!(windows) { "nccl.dll" } else { "libnccl.so" }; // the name that cudarc loads
        // SAFETY: loading NCCL only initialises the library.
        unsafe { Library::new(name) }.ok()
    };
    let why = "no NCCL library (libnccl.so) is where the system looks for libraries; install it or set LD_LIBRARY_PATH";
    LIBRARY.get_or_init(load).as_ref().map(|_| ()).ok_or_else(|| why.into())
}

/// `CUlaunchAttribute`: a kind and a value of 64 bytes, of which this attribute uses an `int`.
#[repr(C, align(8))]
struct Attribute {
    kind: u32,
    pad: u32,
    value: [i32; 16],
}

/// `CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION`
const PROGRAMMATIC_STREAM_SERIALIZATION: u32 = 6;

/// `CUlaunchConfig`
#[repr(C)]
struct Config {
    grid: [u32; 3],
    block: [u32; 3],
    shared: u32,
    stream: CUstream,
    attributes: *mut Attribute,
    count: u32,
}

type LaunchKernelEx = unsafe extern "C" fn(*const Config, CUfunction, *mut *mut c_void, *mut *mut c_void) -> CUresult;

/// `cuLaunchKernelEx`, for programmatic dependent launches: their blocks may start before the previous launch has ended.
#[derive(Clone, Copy)]
pub(super) struct OverlappingLaunch(LaunchKernelEx);

impl OverlappingLaunch {
    /// `None` if the driver is older than CUDA 11.8.
    pub(super) fn find() -> Option<Self> {
        // SAFETY: the type is that of the function with this name, and the library is never unloaded.
        unsafe { library().ok()?.get(b"cuLaunchKernelEx\0") }.ok().map(|function| Self(*function))
    }

    /// Launches a kernel.
    ///
    /// # Safety
    ///
    /// As for any launch: `params` point to the values of the kernel's parameters, with which it touches only memory that it may.
    pub(super) unsafe fn launch(
        self,
        plan: Plan,
        function: CUfunction,
        stream: CUstream,
        params: &mut [*mut c_void],
    ) -> Result<(), DriverError> {
        let mut value = [0; 16];
        value[0] = 1;
        let mut attribute = Attribute { kind: PROGRAMMATIC_STREAM_SERIALIZATION, pad: 0, value };
        let (grid, block) = ([plan.grid, 1, 1], [plan.block, 1, 1]);
        let config = Config { grid, block, shared: plan.shared, stream, attributes: &mut attribute, count: 1 };
        // SAFETY: by the caller's promise; the configuration and its attribute live until the call returns.
        unsafe { (self.0)(&config, function, params.as_mut_ptr(), std::ptr::null_mut()) }.result()
    }
}

/// `CUtensorMap`: the position of a matrix, and the boxes in which it moves. Aligned as in CUDA 13; earlier versions need half of
/// that.
#[repr(C, align(128))]
pub(super) struct TensorMap([u64; 16]);

type EncodeTiled = unsafe extern "C" fn(
    *mut TensorMap,
    u32, // element type
    u32, // dimensions
    *mut c_void,
    *const u64, // sizes, innermost first
    *const u64, // strides in bytes, without the innermost
    *const u32, // sizes of a box
    *const u32, // element strides
    u32,        // interleaving
    u32,        // swizzle
    u32,        // L2 promotion
    u32,        // fill for elements outside
) -> CUresult;

/// `CU_TENSOR_MAP_DATA_TYPE_UINT16`: the elements are only moved, not converted.
const UINT16: u32 = 1;
/// `CU_TENSOR_MAP_INTERLEAVE_NONE`
const INTERLEAVE_NONE: u32 = 0;
/// `CU_TENSOR_MAP_SWIZZLE_128B`
const SWIZZLE_128B: u32 = 3;
/// `CU_TENSOR_MAP_L2_PROMOTION_L2_256B`
const L2_256B: u32 = 3;
/// `CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE`: zeros.
const OUTSIDE_ZERO: u32 = 0;

/// `cuTensorMapEncodeTiled`.
#[derive(Clone, Copy)]
pub(super) struct TensorMapEncoder(EncodeTiled);

impl TensorMapEncoder {
    /// `None` if the driver is older than CUDA 12.0.
    pub(super) fn find() -> Option<Self> {
        // SAFETY: the type is that of the function with this name, and the library is never unloaded.
        unsafe { library().ok()?.get(b"cuTensorMapEncodeTiled\0") }.ok().map(|function| Self(*function))
    }

    /// Encodes a tensor map; the context must be current.
    pub(super) fn encode(self, address: CUdeviceptr, tiles: Tiles) -> Result<TensorMap, DriverError> {
        let Tiles { offset, stride, rows, cols, tile: [down, across] } = tiles;
        let (sizes, stride) = ([u64::from(cols), u64::from(rows)], 2 * u64::from(stride));
        let address = address + offset as CUdeviceptr;
        let mut map = TensorMap([0; 16]);
        // SAFETY: the map is ours to write, and the arrays have the lengths for a tensor of two dimensions (one less for
        // strides). Nothing is read through the address here.
        let made = unsafe {
            (self.0)(
                &mut map,
                UINT16,
                2,
                address as *mut c_void,
                sizes.as_ptr(),
                &stride,
                [across, down].as_ptr(),
                [1, 1].as_ptr(),
                INTERLEAVE_NONE,
                SWIZZLE_128B,
                L2_256B,
                OUTSIDE_ZERO,
            )
        };
        made.result().map(|()| map)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::{offset_of, size_of};

    /// Layouts as C has them on 64-bit machines, which the driver reads.
    #[test]
    fn structs_are_laid_out_as_in_cuda_h() {
        assert_eq!((size_of::<Attribute>(), offset_of!(Attribute, value)), (72, 8));
        assert_eq!((size_of::<Config>(), offset_of!(Config, stream), offset_of!(Config, count)), (56, 32, 48));
        assert_eq!(size_of::<TensorMap>(), 128);
    }
}
