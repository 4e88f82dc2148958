//! A CUDA device without a GPU: the same host code and the shipped PTX, on an interpreter that checks every access.

use std::cell::Cell;
use std::sync::OnceLock;

use lowrank::cuda::Kernel;
use lowrank::cuda::plan::Plan;
use lowrank::cuda::{self, Arg, Cuda, Device, Gpu, Launch, Tiles};
use lowrank::{DType, Error, Float, Result};
use ptx_interpreter::{Fault, Global, Module, TensorMap};

/// Runs the kernels of one module.
pub struct Emulator {
    module: Ptx,
    /// The kernels that are only for Hopper.
    hopper: Option<Ptx>,
    gpu: Gpu,
    dtype: DType,
    /// The first of the launches that may overlap with the next one.
    pending: Cell<Option<u32>>,
}

enum Ptx {
    Shipped(&'static Module),
    Changed(Module),
}

impl Emulator {
    /// With the shipped PTX, parsed once.
    pub fn new(dtype: DType) -> Self {
        static MODULES: [OnceLock<Module>; 3] = [const { OnceLock::new() }; 3];
        let module = Ptx::Shipped(MODULES[dtype as usize].get_or_init(|| parse(dtype, cuda::ptx(dtype))));
        let gpu = Gpu { capability: (8, 0), multiprocessors: 4 };
        Self { module, hopper: None, gpu, dtype, pending: Cell::default() }
    }

    /// With one multiprocessor, so that no output is too small for wide tiles.
    pub fn with_one_multiprocessor(dtype: DType) -> Self {
        let emulator = Self::new(dtype);
        Self { gpu: Gpu { multiprocessors: 1, ..emulator.gpu }, ..emulator }
    }

    /// As a Hopper GPU with four multiprocessors: two clusters, fewer than the number of tiles of the larger shapes.
    pub fn hopper(dtype: DType) -> Self {
        static MODULES: [OnceLock<[Module; 2]>; 3] = [const { OnceLock::new() }; 3];
        let of_any_gpu = || parse(dtype, &cuda::from_hopper_on(cuda::ptx(dtype)));
        let of_hopper = || parse(dtype, cuda::hopper_ptx(dtype).unwrap_or_default());
        let [module, hopper] = MODULES[dtype as usize].get_or_init(|| [of_any_gpu(), of_hopper()]);
        let emulator = Self::new(dtype);
        let gpu = Gpu { capability: (9, 0), ..emulator.gpu };
        Self { module: Ptx::Shipped(module), hopper: Some(Ptx::Shipped(hopper)), gpu, ..emulator }
    }

    /// As a GPU newer than Hopper, with one multiprocessor: launches overlap, but the kernels for Hopper are not used.
    pub fn younger(dtype: DType) -> Self {
        let emulator = Self::hopper(dtype);
        Self { hopper: None, gpu: Gpu { capability: (10, 0), multiprocessors: 1 }, ..emulator }
    }

    /// With other PTX, on one multiprocessor.
    pub fn with_ptx(dtype: DType, ptx: &str) -> Self {
        Self { module: Ptx::Changed(parse(dtype, ptx)), ..Self::with_one_multiprocessor(dtype) }
    }

    /// As a GPU newer than Hopper, with other PTX.
    pub fn younger_with_ptx(dtype: DType, ptx: &str) -> Self {
        Self { module: Ptx::Changed(parse(dtype, &cuda::from_hopper_on(ptx))), ..Self::younger(dtype) }
    }

    /// As a Hopper GPU with this number of multiprocessors and other PTX for Hopper.
    pub fn with_hopper_ptx(dtype: DType, ptx: &str, multiprocessors: u32) -> Self {
        let emulator = Self::hopper(dtype);
        Self { hopper: Some(Ptx::Changed(parse(dtype, ptx))), gpu: Gpu { multiprocessors, ..emulator.gpu }, ..emulator }
    }

    /// A backend on it.
    pub fn backend<E: Float>() -> Cuda<E, Self> {
        Cuda::on(Self::new(E::DTYPE))
    }

    /// A backend on it as a Hopper GPU.
    pub fn hopper_backend<E: Float>() -> Cuda<E, Self> {
        Cuda::on(Self::hopper(E::DTYPE))
    }

    /// The interpreter's launch for one of ours.
    pub fn run(&self, plan: Plan, overlaps: bool, args: Vec<Arg<'_, Global>>) -> Result<()> {
        let mut args: Vec<_> = args.into_iter().map(argument).collect();
        let launch = ptx_interpreter::Launch { grid: plan.grid, block: plan.block, shared: plan.shared as usize };
        let kernel = format!("{}_{}", plan.kernel, self.dtype);
        let pending = self.pending.get().filter(|_| overlaps && self.gpu.capability >= (9, 0));
        let report = launch.run_after(pending, self.module(plan.kernel), &kernel, &mut args).map_err(failed)?;
        self.pending.set(Some(pending.unwrap_or(report.number)));
        Ok(())
    }

    fn module(&self, kernel: Kernel) -> &Module {
        match &self.hopper {
            Some(hopper) if kernel.is_for_hopper() => hopper.module(),
            _ => self.module.module(),
        }
    }
}

impl Ptx {
    fn module(&self) -> &Module {
        match self {
            Self::Shipped(module) => module,
            Self::Changed(module) => module,
        }
    }
}

fn parse(dtype: DType, ptx: &str) -> Module {
    Module::parse(ptx).unwrap_or_else(|error| panic!("{dtype}: {error}"))
}

fn failed(fault: Fault) -> Error {
    Error::Device { backend: "cuda", reason: fault.to_string() }
}

impl Device for Emulator {
    type Memory = Global;

    fn name(&self) -> String {
        "emulated".into()
    }

    fn gpu(&self) -> Gpu {
        self.gpu
    }

    fn alloc(&self, bytes: usize) -> Result<Global> {
        Ok(Global::uninitialised(bytes))
    }

    fn zeros(&self, bytes: usize) -> Result<Global> {
        Ok(Global::from_bytes(&vec![0; bytes]))
    }

    fn write(&self, memory: &mut Global, host: &[u8]) -> Result<()> {
        assert_eq!(memory.bytes().len(), host.len());
        memory.copy_from(host);
        Ok(())
    }

    fn read(&self, memory: &Global, host: &mut [u8]) -> Result<()> {
        assert!(memory.is_initialised(), "reads back what nothing wrote");
        host.copy_from_slice(memory.bytes());
        Ok(())
    }

    fn bytes(memory: &Global) -> usize {
        memory.bytes().len()
    }

    fn address(_memory: &Global) -> u64 {
        0
    }

    fn launch(&self, launch: Launch<'_, Self>) -> Result<()> {
        self.run(launch.plan(), launch.overlaps(), launch.into_args())
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
}

fn argument(arg: Arg<'_, Global>) -> ptx_interpreter::Arg<'_> {
    match arg {
        Arg::U32(value) => ptx_interpreter::Arg::U32(value),
        Arg::U64(value) => ptx_interpreter::Arg::U64(value),
        Arg::F32(value) => ptx_interpreter::Arg::F32(value),
        Arg::Null => ptx_interpreter::Arg::Null,
        Arg::Read(memory, offset) => ptx_interpreter::Arg::ReadAt(memory, offset as u64),
        Arg::Write(memory, offset) => ptx_interpreter::Arg::WriteAt(memory, offset as u64),
        Arg::ReadTiles(memory, map) => ptx_interpreter::Arg::ReadTiles(memory, tiles(map)),
        Arg::WriteTiles(memory, map) => ptx_interpreter::Arg::WriteTiles(memory, tiles(map)),
    }
}

fn tiles(Tiles { offset, stride, rows, cols, tile }: Tiles) -> TensorMap {
    TensorMap::matrix(rows.into(), cols.into(), tile).strided(offset as u64, stride.into())
}

/// The GPU, if there is one; otherwise prints a note. With `LOWRANK_REQUIRE=cuda` a missing GPU is a failure.
pub fn open<E: Float>() -> Option<Cuda<E>> {
    match Cuda::new(0) {
        Ok(gpu) => Some(gpu),
        Err(error @ Error::Unavailable { .. }) if !super::is_required("cuda") => {
            println!("not run: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}
