//! Chooses an adapter, and opens a device with all of its limits.

use std::path::PathBuf;

use super::cache::{self, Cache};
use super::clock;
use super::dispatch::Gpu;
use crate::error::{Error, Result};

/// Features that are used if the adapter has them: `f16`, subgroups, timestamps.
const OPTIONAL_FEATURES: wgpu::Features =
    wgpu::Features::SHADER_F16.union(wgpu::Features::SUBGROUP).union(clock::REQUIRED_FEATURES);

/// Features that cooperative matrices need.
const MATRIX_FEATURES: wgpu::Features =
    wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX.union(wgpu::Features::SUBGROUP).union(wgpu::Features::SHADER_F16);

/// The adapter to open, and options.
pub(super) struct OpenOptions {
    /// The adapter's number, or a part of its name; `None`: the best.
    pub(super) adapter: Option<String>,
    /// Use cooperative matrices; an error if the adapter has none.
    pub(super) matrices: bool,
    /// The file in which compiled pipelines are stored.
    pub(super) pipelines: Option<PathBuf>,
}

impl OpenOptions {
    /// The options in the environment's variables.
    pub(super) fn from_env() -> Self {
        Self {
            adapter: std::env::var("LOWRANK_ADAPTER").ok(),
            matrices: std::env::var("LOWRANK_COOPERATIVE_MATRICES").is_ok_and(|asked| asked == "1"),
            pipelines: std::env::var_os("LOWRANK_PIPELINES").filter(|path| !path.is_empty()).map(PathBuf::from),
        }
    }
}

/// Opens a device with these options, and the optional features that the adapter has.
pub(super) fn open(options: OpenOptions) -> Result<Gpu> {
    let adapter = choose(adapters(), options.adapter.as_deref())?;
    let info = adapter.get_info();
    let matrix = if options.matrices { matrix_size(&adapter)? } else { 0 };
    let mut features =
        adapter.features() & if options.matrices { OPTIONAL_FEATURES | MATRIX_FEATURES } else { OPTIONAL_FEATURES };
    if options.pipelines.is_some() {
        if !adapter.features().contains(cache::REQUIRED_FEATURES) {
            return Err(unavailable(format!("{} on {} does not support pipeline caches", info.name, info.backend)));
        }
        features |= cache::REQUIRED_FEATURES;
    }
    let descriptor = wgpu::DeviceDescriptor {
        label: Some("lowrank"),
        required_features: features,
        required_limits: adapter.limits(),
        experimental_features: if options.matrices { experimental_features() } else { wgpu::ExperimentalFeatures::disabled() },
        ..Default::default()
    };
    let opened = pollster::block_on(adapter.request_device(&descriptor));
    let (device, queue) = opened.map_err(|error| unavailable(format!("{}: {error}", info.name)))?;
    let mut gpu = Gpu::new(device, queue, format!("{}, {}", info.name, info.backend), matrix)?;
    gpu.cache = options.pipelines.map(|path| Cache::open(&gpu, path)).transpose()?;
    let lost = gpu.lost.clone();
    gpu.device.set_device_lost_callback(move |_, reason| drop(lost.set(format!("the device is lost: {reason}"))));
    Ok(gpu)
}

/// The side of the adapter's largest square matrices of f16 that accumulate in f32.
fn matrix_size(adapter: &wgpu::Adapter) -> Result<u32> {
    use wgpu::CooperativeScalarType::{F16, F32};
    let square = |kind: &wgpu::CooperativeMatrixProperties| {
        let sides = [kind.m_size, kind.n_size, kind.k_size];
        let of_halves = (kind.ab_type, kind.cr_type) == (F16, F32) && !kind.saturating_accumulation;
        (of_halves && [8, 16].contains(&sides[0]) && sides == [sides[0]; 3]).then_some(sides[0])
    };
    let largest = adapter.cooperative_matrix_properties().iter().filter_map(square).max();
    let largest = largest.filter(|_| adapter.features().contains(MATRIX_FEATURES));
    largest.ok_or_else(|| {
        unavailable(format!("{} has no cooperative matrices of f16 that accumulate in f32", adapter.get_info().name))
    })
}

/// Enables wgpu's experimental features.
#[allow(unsafe_code, reason = "wgpu asks for a word, not for a proof")]
fn experimental_features() -> wgpu::ExperimentalFeatures {
    // SAFETY: no memory is at stake here. Wgpu requires a statement that its experiments may have bugs; the caller of
    // `with_cooperative_matrices` was told so, and asked for them by name.
    unsafe { wgpu::ExperimentalFeatures::enabled() }
}

/// All adapters with compute shaders, the best first.
fn adapters() -> Vec<wgpu::Adapter> {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
        backends: wgpu::Backends::from_env().unwrap_or(wgpu::Backends::PRIMARY),
        ..wgpu::InstanceDescriptor::new_without_display_handle()
    });
    let mut adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::all()));
    let computes = wgpu::DownlevelFlags::COMPUTE_SHADERS;
    adapters.retain(|adapter| adapter.get_downlevel_capabilities().flags.contains(computes));
    adapters.sort_by_key(|adapter| match adapter.get_info().device_type {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::IntegratedGpu => 1,
        wgpu::DeviceType::VirtualGpu => 2,
        wgpu::DeviceType::Other => 3,
        wgpu::DeviceType::Cpu => 4,
    });
    adapters
}

fn choose(adapters: Vec<wgpu::Adapter>, name: Option<&str>) -> Result<wgpu::Adapter> {
    let names: Vec<String> = adapters.iter().map(|adapter| adapter.get_info().name).collect();
    let Some(name) = name else {
        return adapters.into_iter().next().ok_or_else(|| unavailable("this machine has no adapter".into()));
    };
    let lower = name.to_lowercase();
    let by_number = name.parse().ok().filter(|&number: &usize| number < names.len());
    let chosen = by_number.or_else(|| names.iter().position(|name| name.to_lowercase().contains(&lower)));
    let adapter = chosen.and_then(|number| adapters.into_iter().nth(number));
    adapter.ok_or_else(|| unavailable(format!("no adapter is `{name}`; there are: {}", names.join(", "))))
}

fn unavailable(reason: String) -> Error {
    Error::Unavailable { backend: "webgpu", reason }
}
