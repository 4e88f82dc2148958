//! lowrank's verbs on WebGPU beside the same verbs out of burn's products.
//!
//! `cargo run --release --manifest-path rivals/burn/Cargo.toml -- [--quick] [--json FILE]`, and the other flags of `rivals`.
//!
//! burn opens the adapter and lowrank joins it on the same device and queue. Everyone is checked against the f64 oracle first;
//! that is also when burn tries its kernels at a shape and keeps the fastest. Then runs are interleaved, by the clock on the wall,
//! until the device is done.

mod burn;

use std::error::Error;

use burn_wgpu::graphics::AutoGraphicsApi;
use burn_wgpu::{RuntimeOptions, WgpuDevice, init_setup};
use clap::Parser;
use lowrank::{Backend, WebGpu};
use rivals::options::{Dtype, Options};
use rivals::peaks::Peaks;
use rivals::race::race;
use rivals::table::{Report, print_peaks};

use burn::Burn;

/// lowrank's verbs on WebGPU beside the same verbs out of burn's products, in f32.
#[derive(Parser)]
#[command(version = None)]
struct Args {
    #[command(flatten)]
    options: Options,
}

fn main() -> Result<(), Box<dyn Error>> {
    let Args { options } = Args::parse();
    let device = WgpuDevice::default();
    let setup = init_setup::<AutoGraphicsApi>(&device, RuntimeOptions::default());
    let gpu = WebGpu::<f32>::from_device(setup.device, setup.queue)?;
    println!("{}", gpu.device());
    let peaks = Peaks::of_device(&gpu)?;
    print_peaks(&peaks);
    let legend = "burn: its own choice among its kernels, outputs allocated at every run, as its users have it";
    let mut report = Report::new(&options, &Burn::NAMES, legend)?;
    if options.dtypes().contains(&Dtype::F32) {
        race(&options, &Burn::new(device), vec![(gpu, peaks)], &mut report)?;
    }
    report.finish()
}
