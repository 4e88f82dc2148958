//! The trait of a GPU. `Driver` implements it with hardware, the tests' emulator with an interpreter.

use super::plan::Plan;
use crate::error::Result;

/// Memory, and launches of the kernels in [`ptx`](super::ptx).
///
/// Calls may return before the device has finished. The device executes them in order, and [`read`](Self::read) waits.
pub trait Device: Sized + 'static {
    /// An allocation, which is freed when it is dropped and the launches that use it have ended; or memory that is lent.
    type Memory: 'static;

    /// The device's name, for errors and `Debug`.
    fn name(&self) -> String;
    /// The properties that plans depend on.
    fn gpu(&self) -> Gpu;
    /// Allocates `bytes` bytes, not initialised. Errors: [`OutOfMemory`](crate::Error::OutOfMemory).
    fn alloc(&self, bytes: usize) -> Result<Self::Memory>;
    /// Allocates `bytes` zero bytes.
    fn zeros(&self, bytes: usize) -> Result<Self::Memory>;
    /// Overwrites a whole allocation; returns when `host` has been read.
    fn write(&self, memory: &mut Self::Memory, host: &[u8]) -> Result<()>;
    /// Copies a whole allocation to `host`, after everything that writes it.
    fn read(&self, memory: &Self::Memory, host: &mut [u8]) -> Result<()>;
    /// A lower bound of the memory's length in bytes.
    fn bytes(memory: &Self::Memory) -> usize;
    /// The memory's address, exactly or modulo 256: plans need its alignment.
    fn address(memory: &Self::Memory) -> u64;
    /// Launches a kernel.
    fn launch(&self, launch: Launch<'_, Self>) -> Result<()>;
    /// Waits until all earlier calls have finished.
    fn synchronize(&self) -> Result<()>;
}

/// The properties of a GPU that plans depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// The compute capability whose kernels it can run: the GPU's, but `(9, 0)` (Hopper) only if the driver can load those
    /// kernels.
    pub capability: (u32, u32),
    /// Number of multiprocessors.
    pub multiprocessors: u32,
}

/// A tensor map: a row-major matrix of 16-bit elements, and the box that one TMA copy moves. A row of a box is 128 bytes, whose
/// 16-byte chunks are permuted (`CU_TENSOR_MAP_SWIZZLE_128B`). Elements outside the matrix are read as zero, and not stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiles {
    /// Offset of the matrix in the memory, in bytes; its address is a multiple of 16.
    pub offset: usize,
    /// Elements between the starts of consecutive rows: a multiple of 8.
    pub stride: u32,
    /// Rows of the matrix; at least 1.
    pub rows: u32,
    /// Columns of the matrix: a multiple of 8, at least 8.
    pub cols: u32,
    /// Rows and columns of a box: up to 256, and 64.
    pub tile: [u32; 2],
}

/// An argument of a kernel. All are passed with the launch; nothing else is copied to the device.
pub enum Arg<'a, M> {
    /// A size or a key.
    U32(u32),
    /// A number of elements.
    U64(u64),
    /// A scalar of the formula.
    F32(f32),
    /// A null pointer: an operand that is not given.
    Null,
    /// An operand that the kernel reads: memory, and its offset in bytes.
    Read(&'a M, usize),
    /// An operand that the kernel writes, and may read: memory, and its offset in bytes.
    Write(&'a mut M, usize),
    /// A tensor map of an operand that the kernel reads.
    ReadTiles(&'a M, Tiles),
    /// A tensor map of an operand that the kernel writes.
    WriteTiles(&'a mut M, Tiles),
}

impl<M> Arg<'_, M> {
    /// The same memory for another launch that writes it; `Null` for other arguments.
    pub(super) fn reborrow(&mut self) -> Arg<'_, M> {
        match self {
            Self::Write(memory, offset) => Arg::Write(memory, *offset),
            _ => Arg::Null,
        }
    }

    /// The same memory for another launch that reads it; `Null` for other arguments.
    pub(super) fn as_read(&self) -> Arg<'_, M> {
        match self {
            Self::Write(memory, offset) => Arg::Read(memory, *offset),
            _ => Arg::Null,
        }
    }
}

impl<M> From<u32> for Arg<'_, M> {
    fn from(value: u32) -> Self {
        Self::U32(value)
    }
}

impl<M> From<u64> for Arg<'_, M> {
    fn from(value: u64) -> Self {
        Self::U64(value)
    }
}

impl<M> From<f32> for Arg<'_, M> {
    fn from(value: f32) -> Self {
        Self::F32(value)
    }
}

/// A launch: a kernel, its grid and its arguments. Only verbs make one, from a checked request, and only for the device type `D`
/// that allocated its memory. So the memory is as long as the shapes say, provided that `D` allocates what it is asked for.
pub struct Launch<'a, D: Device> {
    plan: Plan,
    args: Vec<Arg<'a, D::Memory>>,
    overlaps: bool,
}

impl<'a, D: Device> Launch<'a, D> {
    pub(super) fn new(plan: Plan, args: Vec<Arg<'a, D::Memory>>, overlaps: bool) -> Self {
        Self { plan, args, overlaps }
    }

    /// True if the launch may start before the previous one has ended, on GPUs from Hopper on: both belong to one verb, with no
    /// other call between them. The kernel itself waits before it uses the previous launch's results.
    ///
    /// On a [`Driver`](super::Driver) launches do not overlap if cudarc tracks events, as it does in a context with several
    /// streams: it records events between the launches. Results are the same.
    pub fn overlaps(&self) -> bool {
        self.overlaps
    }

    /// The kernel and its grid.
    pub fn plan(&self) -> Plan {
        self.plan
    }

    /// The arguments, in the order of the kernel's parameters.
    pub fn into_args(self) -> Vec<Arg<'a, D::Memory>> {
        self.args
    }
}
