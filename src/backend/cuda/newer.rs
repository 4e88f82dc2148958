//! What the driver learned with CUDA 11.8 and 12.0: launches that overlap, and tensor maps.
//!
//! cudarc has them only if it is built for such a version. Which one it is built for is the caller's choice, or that of the `nvcc` on
//! the PATH, and where we named one, other crates could name no other. So these two are looked up in the driver by name.
#![allow(unsafe_code, reason = "functions of the driver by their names: their types are what its documentation says")]

use std::ffi::c_void;
use std::sync::OnceLock;

use cudarc::driver::DriverError;
use cudarc::driver::sys::{CUdeviceptr, CUfunction, CUresult, CUstream};
use libloading::Library;

use super::device::Tiles;
use super::plan::Plan;

/// NVIDIA's driver. It stays loaded, so that what is found there may be called as long as the program runs. `Err` says why it is not
/// there.
pub(super) fn library() -> Result<&'static Library, &'static str> {
    static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();
    LIBRARY.get_or_init(load).as_ref().map_err(String::as_str)
}

fn load() -> Result<Library, String> {
    let names = if cfg!(windows) { &["nvcuda.dll"][..] } else { &["libcuda.so.1", "libcuda.so"][..] };
    let mut reason = String::new();
    for name in names {
        // SAFETY: NVIDIA's driver library does nothing when it is loaded but set itself up.
        match unsafe { Library::new(*name) } {
            Ok(library) => return Ok(library),
            Err(error) => reason = format!("no NVIDIA driver: {error}"),
        }
    }
    Err(reason)
}

/// `CUlaunchAttribute`: a kind and 64 bytes, of which this one uses an `int`.
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

/// `cuLaunchKernelEx`, for programmatic dependent launches: their blocks may come before the launch before has ended.
#[derive(Clone, Copy)]
pub(super) struct Overlapping(LaunchKernelEx);

impl Overlapping {
    /// None: the driver is older than CUDA 11.8.
    pub(super) fn find() -> Option<Self> {
        // SAFETY: the type is that of the function with this name, and the library stays loaded.
        unsafe { library().ok()?.get(b"cuLaunchKernelEx\0") }.ok().map(|function| Self(*function))
    }

    /// Launches a kernel.
    ///
    /// # Safety
    ///
    /// As for any launch: `params` point to the values of the kernel's parameters, and with these it touches only memory that it may.
    pub(super) unsafe fn launch(
        self,
        plan: Plan,
        function: CUfunction,
        stream: CUstream,
        params: &mut [*mut c_void],
    ) -> Result<(), DriverError> {
        let mut value = [0; 16];
        value[0] = 1; // yes
        let mut attribute = Attribute { kind: PROGRAMMATIC_STREAM_SERIALIZATION, pad: 0, value };
        let (grid, block) = ([plan.grid, 1, 1], [plan.block, 1, 1]);
        let config = Config { grid, block, shared: plan.shared, stream, attributes: &mut attribute, count: 1 };
        // SAFETY: the caller's promise; the configuration and its one attribute live until the call returns.
        unsafe { (self.0)(&config, function, params.as_mut_ptr(), std::ptr::null_mut()) }.result()
    }
}

/// `CUtensorMap`: where a matrix lies, and in which boxes it moves. Aligned as CUDA 13 has it; before, half of that was enough.
#[repr(C, align(128))]
pub(super) struct TensorMap([u64; 16]);

type EncodeTiled = unsafe extern "C" fn(
    *mut TensorMap,
    u32, // type of the elements
    u32, // dimensions
    *mut c_void,
    *const u64, // sizes, the innermost first
    *const u64, // bytes from one to the next, but of the innermost
    *const u32, // sizes of a box
    *const u32, // every how many elements
    u32,        // how elements are interleaved
    u32,        // how a box is swizzled
    u32,        // how much the L2 cache fetches
    u32,        // what lies outside
) -> CUresult;

/// `CU_TENSOR_MAP_DATA_TYPE_UINT16`: elements are only moved.
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
pub(super) struct Maps(EncodeTiled);

impl Maps {
    /// None: the driver is older than CUDA 12.0.
    pub(super) fn find() -> Option<Self> {
        // SAFETY: the type is that of the function with this name, and the library stays loaded.
        unsafe { library().ok()?.get(b"cuTensorMapEncodeTiled\0") }.ok().map(|function| Self(*function))
    }

    /// Has the driver make a tensor map; the context is current.
    pub(super) fn encode(self, address: CUdeviceptr, tiles: Tiles) -> Result<TensorMap, DriverError> {
        let Tiles { offset, stride, rows, cols, tile: [down, across] } = tiles;
        let (sizes, stride) = ([u64::from(cols), u64::from(rows)], 2 * u64::from(stride));
        let address = address + offset as CUdeviceptr;
        let mut map = TensorMap([0; 16]);
        // SAFETY: the map is ours to write, and the arrays are as long as a tensor of two dimensions needs (strides: one less).
        // Nothing reads through the address here.
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

    /// As C lays them out on 64-bit machines: what the driver reads.
    #[test]
    fn structs_are_laid_out_as_in_cuda_h() {
        assert_eq!((size_of::<Attribute>(), offset_of!(Attribute, value)), (72, 8));
        assert_eq!((size_of::<Config>(), offset_of!(Config, stream), offset_of!(Config, count)), (56, 32, 48));
        assert_eq!(size_of::<TensorMap>(), 128);
    }
}
