//! The emulated device with counters.

use std::cell::RefCell;

use lowrank::Error;
use lowrank::cuda::{Device, Gpu, Launch};

use super::emulator::Emulator;

/// Counts of a device's work.
#[derive(Debug, Default)]
pub struct Asked {
    /// The launched kernels, in order.
    pub kernels: Vec<&'static str>,
    pub launches: usize,
    pub overlapping: usize,
    /// Copies between host and device.
    pub copies: usize,
    /// Bytes that were allocated.
    pub scratch: usize,
}

/// The emulator, with counters.
pub struct Counting(Emulator, RefCell<Asked>);

impl Counting {
    pub fn new(emulator: Emulator) -> Self {
        Self(emulator, RefCell::default())
    }

    /// The counts since the last call.
    pub fn asked(&self) -> Asked {
        self.1.take()
    }
}

impl Device for Counting {
    type Memory = <Emulator as Device>::Memory;

    fn name(&self) -> String {
        self.0.name()
    }
    fn gpu(&self) -> Gpu {
        self.0.gpu()
    }
    fn alloc(&self, bytes: usize) -> Result<Self::Memory, Error> {
        self.1.borrow_mut().scratch += bytes;
        self.0.alloc(bytes)
    }
    fn zeros(&self, bytes: usize) -> Result<Self::Memory, Error> {
        self.1.borrow_mut().scratch += bytes;
        self.0.zeros(bytes)
    }
    fn write(&self, memory: &mut Self::Memory, host: &[u8]) -> Result<(), Error> {
        self.1.borrow_mut().copies += 1;
        self.0.write(memory, host)
    }
    fn read(&self, memory: &Self::Memory, host: &mut [u8]) -> Result<(), Error> {
        self.1.borrow_mut().copies += 1;
        self.0.read(memory, host)
    }
    fn bytes(memory: &Self::Memory) -> usize {
        Emulator::bytes(memory)
    }
    fn address(memory: &Self::Memory) -> u64 {
        Emulator::address(memory)
    }
    fn launch(&self, launch: Launch<'_, Self>) -> Result<(), Error> {
        let mut asked = self.1.borrow_mut();
        asked.kernels.push(launch.plan().kernel.name());
        asked.launches += 1;
        asked.overlapping += usize::from(launch.overlaps());
        drop(asked);
        self.0.run(launch.plan(), launch.overlaps(), launch.into_args())
    }
    fn synchronize(&self) -> Result<(), Error> {
        panic!("a verb does not wait");
    }
}
