//! The command line.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use lowrank::quant::QuantKind;

/// Trains a network on MNIST, then teaches it its worst digit with adapters of rank 1, and shows that nothing else changed.
#[derive(Parser)]
#[command(name = "mnist_lora", version)]
pub struct Args {
    /// Folder with the four IDX files, gzipped or not [default: $MNIST_DIR, else the user's cache, filled from the mirror]
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Where to download MNIST from [default: $MNIST_MIRROR, else PyTorch's mirror]
    #[arg(long, value_name = "URL")]
    pub mirror: Option<String>,
    /// Draw the digits instead of reading or downloading them
    #[arg(long)]
    pub generate: bool,
    /// Use the first N training images, and N/6 test images
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
    /// Seed of initial weights, shuffles and generated digits; results do not depend on the number of threads
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Rank of the adapters
    #[arg(long, default_value_t = 1)]
    pub rank: usize,
    /// Alpha of the adapters: the update is multiplied by alpha / rank
    #[arg(long, default_value_t = 1.0)]
    pub alpha: f32,
    /// Learning rate of Adam, for the training and for the adapters
    #[arg(long, default_value_t = 1e-3)]
    pub lr: f32,
    /// Number of batches of 10 images that the adapters are trained on
    #[arg(long, default_value_t = 100)]
    pub batches: usize,
    /// Digit to train the adapters on [default: the one with the most test errors]
    #[arg(long, value_parser = clap::value_parser!(u8).range(0..10))]
    pub digit: Option<u8>,
    /// Passes over the training images before the adapters
    #[arg(long, default_value_t = 1)]
    pub epochs: usize,
    /// Quantise the weights after the training, and tune the adapters over them: nf4, fp4, int8 or q8_0
    #[arg(long, value_name = "TYPE")]
    pub quantise: Option<QuantKind>,
    /// Backend to compute on
    #[arg(long, value_enum, default_value_t = Device::Auto)]
    pub backend: Device,
    /// Threads of the CPU backend [default: one for each core]
    #[arg(long)]
    pub threads: Option<usize>,
    /// Save the run to this folder while it trains
    #[arg(long, value_name = "DIR")]
    pub checkpoint: Option<PathBuf>,
    /// Steps from one checkpoint to the next; the end of the training and of the tuning are saved too
    #[arg(long, value_name = "N", default_value_t = 500, requires = "checkpoint", value_parser = clap::value_parser!(u32).range(1..))]
    pub checkpoint_every: u32,
    /// Go on with the run in the folder of `--checkpoint`; the results have the bits of an uninterrupted run
    #[arg(long, requires = "checkpoint")]
    pub resume: bool,
    /// Train on all processes that `mpirun` started; each computes a part of every batch
    #[arg(long, value_enum, default_value_t = Engine::None)]
    pub distributed: Engine,
    /// Folder for the adapter and the charts
    #[arg(long, value_name = "DIR", default_value = "out/mnist_lora")]
    pub out: PathBuf,
    /// Also write every figure to this file
    #[arg(long, value_name = "PATH")]
    pub json: Option<PathBuf>,
}

/// The backend to compute on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Device {
    /// An NVIDIA GPU if there is one and CUDA is compiled in, else the CPU
    Auto,
    /// SIMD and threads
    Cpu,
    /// Any GPU, through Vulkan, Metal or DirectX; needs `--features webgpu`
    Webgpu,
    /// NVIDIA GPUs; needs `--features cuda`
    Cuda,
}

/// What connects several processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Engine {
    /// One process
    None,
    /// MPI; needs the program in `integrations/mpi`
    Mpi,
}
