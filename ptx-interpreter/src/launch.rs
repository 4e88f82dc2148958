//! Launches: size, options, and execution, one cluster after another.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::arg::{Arg, Args};
use crate::cluster::{Checks, Cluster, Context};
use crate::fault::{Fault, Kind};
use crate::memory::Memory;
use crate::parse::{Kernel, Module};
use crate::semantics::Semantics;
use crate::warp::Grid;

/// The size of a launch, and its dynamic shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks, along x.
    pub grid: u32,
    /// Threads of a block.
    pub block: u32,
    /// Bytes of dynamic shared memory.
    pub shared: usize,
}

/// Options of a launch, with defaults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Blocks along y and z.
    pub grid_yz: [u32; 2],
    /// Blocks of a cluster, along x: 1 or 2. `None`: the kernel's number (`.reqnctapercluster`), or 1.
    pub cluster: Option<u32>,
    /// The first launch that may not have ended: see [`Launch::run_after`].
    pub pending: Option<u32>,
    /// Optional checks.
    pub checks: Checks,
}

impl Default for Options {
    fn default() -> Self {
        Self { grid_yz: [1, 1], cluster: None, pending: None, checks: Checks::default() }
    }
}

/// The report of a launch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Executed instructions, counted by warp.
    pub instructions: u64,
    /// The number of the launch: later launches have larger ones.
    pub number: u32,
}

/// Limit of instructions, after which an endless loop is reported.
const BUDGET: u64 = 50_000_000;

/// Counts launches, so that accesses of earlier ones are not taken for races.
static LAUNCHES: AtomicU32 = AtomicU32::new(1);

impl Launch {
    /// Runs a kernel. Errors: the first [`Fault`]; earlier writes remain.
    pub fn run(self, module: &Module, kernel: &str, args: &mut [Arg<'_>]) -> Result<Report, Fault> {
        self.run_with(Options::default(), module, kernel, args)
    }

    /// Runs a kernel as a programmatic dependent launch: the launches from number `pending` on may not have ended when it starts.
    /// Until a thread has executed `griddepcontrol.wait` it must not read what they wrote, nor write anything; and in every block
    /// some thread must wait, or its own dependents could start too early.
    pub fn run_after(self, pending: Option<u32>, module: &Module, kernel: &str, args: &mut [Arg<'_>]) -> Result<Report, Fault> {
        self.run_with(Options { pending, ..Options::default() }, module, kernel, args)
    }

    /// Runs a kernel with options.
    pub fn run_with(self, options: Options, module: &Module, kernel: &str, args: &mut [Arg<'_>]) -> Result<Report, Fault> {
        self.run_as(&Semantics::PTX, options, module, kernel, args)
    }

    /// Runs a kernel on hardware with other semantics than the PTX ISA's.
    pub(crate) fn run_as(
        self,
        semantics: &'static Semantics,
        options: Options,
        module: &Module,
        kernel: &str,
        args: &mut [Arg<'_>],
    ) -> Result<Report, Fault> {
        let fault = |reason: String| Fault { kernel: kernel.into(), line: 0, block: 0, thread: 0, kind: Kind::BadLaunch(reason) };
        let kernel = module.kernel(kernel).ok_or_else(|| fault("there is no such kernel".into()))?;
        let grid = self.grid(options, kernel).map_err(fault)?;
        let args = Args::new(kernel, args).map_err(fault)?;
        let number = LAUNCHES.fetch_add(1, Ordering::Relaxed);
        let Options { pending, checks, .. } = options;
        let (shared, params) = (kernel.static_shared + self.shared, Memory::params(args.bytes.clone()));
        let mut context = Context { kernel, grid, shared, checks, semantics, number, pending, params, args, budget: 0 };
        let mut report = Report { number, ..Report::default() };
        for first in (0..grid.blocks.iter().product()).step_by(grid.cluster as usize) {
            context.budget = BUDGET;
            Cluster::new(&mut context, first).run()?;
            report.instructions += BUDGET - context.budget;
        }
        Ok(report)
    }

    /// Checks the launch against the kernel, and returns the grid.
    fn grid(self, options: Options, kernel: &Kernel) -> Result<Grid, String> {
        let [y, z] = options.grid_yz;
        let blocks = [self.grid, y, z];
        let threads = self.block;
        let (most, shared) = (kernel.max_threads.unwrap_or(1024), kernel.static_shared + self.shared);
        let cluster = options.cluster.or(kernel.cluster).unwrap_or(1);
        let all = blocks.iter().try_fold(1u32, |all, &count| all.checked_mul(count));
        match () {
            _ if all.is_none_or(|all| all == 0) || threads == 0 => {
                Err(format!("a grid of {blocks:?} blocks of {threads} threads is empty, or too large"))
            }
            _ if threads > most => Err(format!("{threads} threads are more than {most}")),
            _ if kernel.required_threads.is_some_and(|required| required != threads) => {
                Err(format!("{threads} threads, where the kernel requires another number"))
            }
            _ if shared > kernel.most_shared => {
                Err(format!("{shared} bytes of shared memory are more than {} KiB", kernel.most_shared >> 10))
            }
            _ if kernel.cluster.is_some_and(|says| says != cluster) => {
                Err(format!("clusters of {cluster} blocks, where the kernel says another number"))
            }
            _ if !(1..=2).contains(&cluster) => {
                Err(format!("clusters of {cluster} blocks are not known here, but of one and two"))
            }
            _ if !self.grid.is_multiple_of(cluster) => Err(format!("{} blocks are no whole clusters of {cluster}", self.grid)),
            _ => Ok(Grid { blocks, cluster, threads }),
        }
    }
}
