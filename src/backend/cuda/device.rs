//! What a GPU must do. `Driver` does it with hardware, the tests' emulator with an interpreter.

use super::plan::Plan;
use crate::error::Result;

/// Memory, and launches of the kernels in [`ptx`](super::ptx).
///
/// Calls may return before the device is done; it does what it is asked in that order, and [`read`](Self::read) waits.
pub trait Device: Sized + 'static {
    /// An allocation; dropping it frees it, once the launches that use it are done. Or memory that is lent: dropping it does nothing.
    type Memory: 'static;

    /// What it is, in words.
    fn name(&self) -> String;
    /// What plans depend on.
    fn gpu(&self) -> Gpu;
    /// `bytes` bytes that hold nothing yet. Errors: [`OutOfMemory`](crate::Error::OutOfMemory).
    fn alloc(&self, bytes: usize) -> Result<Self::Memory>;
    /// `bytes` bytes that are zero.
    fn zeros(&self, bytes: usize) -> Result<Self::Memory>;
    /// Overwrites all of an allocation; when it returns, `host` has been read.
    fn write(&self, memory: &mut Self::Memory, host: &[u8]) -> Result<()>;
    /// Copies all of an allocation, once everything that writes it is done.
    fn read(&self, memory: &Self::Memory, host: &mut [u8]) -> Result<()>;
    /// How many bytes there are in it, at least.
    fn bytes(memory: &Self::Memory) -> usize;
    /// Where it begins. Plans ask which powers of two divide that.
    fn address(memory: &Self::Memory) -> u64;
    /// Runs a kernel.
    fn launch(&self, launch: Launch<'_, Self>) -> Result<()>;
    /// Returns when everything asked for so far is done.
    fn synchronize(&self) -> Result<()>;
}

/// What plans depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// The compute capability whose kernels it runs: its own, and `(9, 0)`, Hopper's, only where the driver can load those.
    pub capability: (u32, u32),
    /// Its multiprocessors.
    pub multiprocessors: u32,
}

/// A tensor map: a row-major matrix of 16-bit elements, and the box of it that one copy moves. A row of the box is 128 bytes,
/// whose chunks of 16 are exchanged (`CU_TENSOR_MAP_SWIZZLE_128B`); outside of the matrix a box is zero, and is not stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiles {
    /// Bytes of the memory before the matrix; where it begins is a multiple of 16.
    pub offset: usize,
    /// Elements from the beginning of a row to that of the next: a multiple of 8.
    pub stride: u32,
    /// Rows of the matrix; not 0.
    pub rows: u32,
    /// Columns of the matrix: a multiple of 8, and not 0.
    pub cols: u32,
    /// Rows and columns of the box: up to 256, and 64.
    pub tile: [u32; 2],
}

/// An argument of a kernel. Scalars travel with the launch: nothing else is copied to the device.
pub enum Arg<'a, M> {
    /// A size, a key.
    U32(u32),
    /// A number of elements.
    U64(u64),
    /// A scalar of the formula.
    F32(f32),
    /// An operand that is not there: a null pointer.
    Null,
    /// An operand that the kernel reads, so many bytes into the memory.
    Read(&'a M, usize),
    /// An operand that the kernel writes, and perhaps reads, so many bytes into the memory.
    Write(&'a mut M, usize),
    /// An operand that the kernel reads by boxes: 128 bytes, by value.
    ReadTiles(&'a M, Tiles),
    /// An operand that the kernel writes by boxes.
    WriteTiles(&'a mut M, Tiles),
}

impl<M> Arg<'_, M> {
    /// The same memory for another launch, to be written; no other argument can be passed twice.
    pub(super) fn again(&mut self) -> Arg<'_, M> {
        match self {
            Self::Write(memory, offset) => Arg::Write(memory, *offset),
            _ => Arg::Null,
        }
    }

    /// The same memory, to be read by another launch.
    pub(super) fn to_read(&self) -> Arg<'_, M> {
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

/// One launch: a kernel, its grid and its arguments. Only verbs make one, from a request whose shapes fit, and for the one device `D`
/// that allocated what it names: no other device takes it, whoever wrote that. So the memory is as long as the shapes say, if `D`
/// allocates as much as it is asked for.
pub struct Launch<'a, D: Device> {
    plan: Plan,
    args: Vec<Arg<'a, D::Memory>>,
    overlaps: bool,
}

impl<'a, D: Device> Launch<'a, D> {
    pub(super) fn new(plan: Plan, args: Vec<Arg<'a, D::Memory>>, overlaps: bool) -> Self {
        Self { plan, args, overlaps }
    }

    /// Whether it may begin before the launch before it has ended, on GPUs from Hopper on: that one belongs to the same verb, and
    /// nothing was asked of the device between them. The kernel itself waits where it needs what that one wrote.
    ///
    /// On a [`Driver`](super::Driver) they do not overlap if cudarc tracks events, as it does in a context with streams besides the
    /// default one: it notes who uses what between the launches. Results are the same.
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
