//! A launch: arguments become parameter bytes, and blocks run one after another.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::block::Cluster;
use crate::fault::{Fault, Kind};
use crate::memory::{Global, Memory};
use crate::parse::{Kernel, Module};

/// How many threads, and how much shared memory beyond what the kernel declares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks.
    pub grid: u32,
    /// Threads a block.
    pub block: u32,
    /// Bytes of dynamic shared memory.
    pub shared: usize,
}

/// One argument.
pub enum Arg<'m> {
    /// A 32-bit number.
    U32(u32),
    /// A 64-bit number.
    U64(u64),
    /// A float.
    F32(f32),
    /// A null pointer.
    Null,
    /// Memory that the kernel may only read.
    Read(&'m Global),
    /// The same, whose pointer is that many bytes further.
    ReadAt(&'m Global, u64),
    /// Memory that the kernel may read and write.
    Write(&'m mut Global),
    /// The same, whose pointer is that many bytes further.
    WriteAt(&'m mut Global, u64),
    /// A map of a tensor, of which TMA loads boxes.
    ReadTiles(&'m Global, Tiles),
    /// A map of a tensor, to which TMA stores boxes.
    WriteTiles(&'m mut Global, Tiles),
}

/// What a tensor map says: a matrix of 16-bit elements, and the box that one copy moves. A row of the box is 128 bytes, and the
/// chunks of the rows are exchanged (`CU_TENSOR_MAP_SWIZZLE_128B`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiles {
    /// Rows of the matrix.
    pub rows: u64,
    /// Columns of the matrix.
    pub cols: u64,
    /// Bytes of the memory before the matrix: a multiple of 16.
    pub offset: u64,
    /// Elements from the beginning of a row to that of the next: a multiple of 8, as rows start at multiples of 16 bytes.
    pub stride: u64,
    /// Rows and columns of the box: up to 256, and 64.
    pub tile: [u32; 2],
}

/// What a launch did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Instructions that warps executed.
    pub instructions: u64,
    /// Its number: later launches have larger ones.
    pub number: u32,
}

/// An argument in memory starts at its number, from 1, times this.
pub(crate) const SPAN: u64 = 1 << 40;

/// Instructions of a warp after which a block is taken to run for ever.
const BUDGET: u64 = 50_000_000;

/// Numbers launches, so that what earlier ones touched cannot clash.
static LAUNCHES: AtomicU32 = AtomicU32::new(1);

/// What all blocks of a launch share.
pub(crate) struct Context<'l, 'm> {
    pub(crate) kernel: &'l Kernel,
    pub(crate) launch: Launch,
    pub(crate) number: u32,
    /// The first of the launches that may not have ended when this one begins.
    pub(crate) pending: Option<u32>,
    pub(crate) params: Memory,
    pub(crate) args: &'l mut [Arg<'m>],
    pub(crate) budget: u64,
}

impl Launch {
    /// Runs a kernel to its end. Errors: the first [`Fault`]; what was written before stays.
    pub fn run(self, module: &Module, kernel: &str, args: &mut [Arg<'_>]) -> Result<Report, Fault> {
        self.run_after(None, module, kernel, args)
    }

    /// The same as a programmatic dependent launch: launches with the number `pending` and larger ones may not have ended when it
    /// begins. Until a thread has executed `griddepcontrol.wait` it must not read what they wrote, nor write anything; and a block
    /// none of whose threads waits would let its own dependents begin too early.
    pub fn run_after(self, pending: Option<u32>, module: &Module, kernel: &str, args: &mut [Arg<'_>]) -> Result<Report, Fault> {
        let fault = |reason: String| Fault { kernel: kernel.into(), line: 0, block: 0, thread: 0, kind: Kind::BadLaunch(reason) };
        let kernel = module.kernel(kernel).ok_or_else(|| fault("there is no such kernel".into()))?;
        self.fits(kernel).map_err(fault)?;
        let params = Memory::params(params(kernel, args).map_err(fault)?);
        for arg in &mut *args {
            if let Arg::Write(global) | Arg::WriteAt(global, _) | Arg::WriteTiles(global, _) = arg {
                global.watch();
            }
        }
        let number = LAUNCHES.fetch_add(1, Ordering::Relaxed);
        let mut context = Context { kernel, launch: self, number, pending, params, args, budget: 0 };
        let mut report = Report { number, ..Report::default() };
        for first in (0..self.grid).step_by(kernel.cluster as usize) {
            context.budget = BUDGET;
            Cluster::new(&mut context, first).run()?;
            report.instructions += BUDGET - context.budget;
        }
        Ok(report)
    }

    fn fits(self, kernel: &Kernel) -> Result<(), String> {
        let Self { grid, block, shared } = self;
        let max_threads = kernel.max_threads.unwrap_or(1024);
        let shared = kernel.static_shared + shared;
        match () {
            _ if grid == 0 || block == 0 => Err(format!("a grid of {grid} blocks of {block} threads is empty")),
            _ if block > max_threads => Err(format!("{block} threads are more than {max_threads}")),
            _ if shared > kernel.most_shared => {
                Err(format!("{shared} bytes of shared memory are more than {} KiB", kernel.most_shared >> 10))
            }
            _ if kernel.cluster > 2 => Err("clusters of more than two blocks are not known here".into()),
            _ if grid % kernel.cluster != 0 => Err(format!("{grid} blocks are no whole clusters of {}", kernel.cluster)),
            _ => Ok(()),
        }
    }
}

/// The arguments as the kernel finds them.
fn params(kernel: &Kernel, args: &[Arg<'_>]) -> Result<Vec<u8>, String> {
    let (want, got) = (kernel.params.len(), args.len());
    if want != got {
        return Err(format!("{got} arguments where the kernel takes {want}"));
    }
    let mut bytes = Vec::new();
    for (i, (arg, &(offset, size))) in args.iter().zip(&kernel.params).enumerate() {
        let value = match arg {
            Arg::U32(value) => value.to_le_bytes().to_vec(),
            Arg::F32(value) => value.to_le_bytes().to_vec(),
            Arg::U64(value) => value.to_le_bytes().to_vec(),
            Arg::Null => 0u64.to_le_bytes().to_vec(),
            Arg::ReadTiles(global, tiles) => tiles.map(global)?,
            Arg::WriteTiles(global, tiles) => tiles.map(global)?,
            Arg::Read(_) | Arg::Write(_) => ((i as u64 + 1) * SPAN).to_le_bytes().to_vec(),
            Arg::ReadAt(_, offset) | Arg::WriteAt(_, offset) => ((i as u64 + 1) * SPAN + offset).to_le_bytes().to_vec(),
        };
        if value.len() != size {
            return Err(format!("argument {i} has {} bytes where the kernel takes {size}", value.len()));
        }
        bytes.resize(offset, 0);
        bytes.extend(value);
    }
    Ok(bytes)
}

impl Tiles {
    /// The bytes of a tensor map, which mean nothing here, if a driver would make one.
    fn map(self, global: &Global) -> Result<Vec<u8>, String> {
        let Self { rows, cols, offset, stride, tile } = self;
        let [down, across] = tile;
        let aligned = offset % 16 == 0 && stride % 8 == 0 && cols % 8 == 0;
        let good = rows > 0 && cols > 0 && stride >= cols && aligned && (1..=256).contains(&down) && across == 64;
        let end = (rows.max(1) - 1).checked_mul(stride).and_then(|first| (first + cols).checked_mul(2)?.checked_add(offset));
        let inside = end.is_some_and(|end| end <= global.bytes().len() as u64);
        if good && inside { Ok(vec![0; 128]) } else { Err(format!("no tensor map of {self:?}")) }
    }
}
