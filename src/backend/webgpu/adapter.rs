//! Which adapter, and a device on it with all that the adapter has.

use super::clock;
use super::dispatch::Gpu;
use crate::error::{Error, Result};

/// What makes launches faster or measurable, asked for where it is there.
const WELCOME: wgpu::Features = wgpu::Features::SHADER_F16.union(wgpu::Features::SUBGROUP).union(clock::NEEDS);

/// Opens the adapter with this number or name, or the best one.
pub(super) fn open(name: Option<&str>) -> Result<Gpu> {
    let adapter = choose(adapters(), name)?;
    let info = adapter.get_info();
    let descriptor = wgpu::DeviceDescriptor {
        label: Some("lowrank"),
        required_features: adapter.features() & WELCOME,
        required_limits: adapter.limits(),
        ..Default::default()
    };
    let opened = pollster::block_on(adapter.request_device(&descriptor));
    let (device, queue) = opened.map_err(|error| unavailable(format!("{}: {error}", info.name)))?;
    let gpu = Gpu::new(device, queue, format!("{}, {}", info.name, info.backend));
    let lost = gpu.lost.clone();
    gpu.device.set_device_lost_callback(move |_, reason| drop(lost.set(format!("the device is lost: {reason}"))));
    Ok(gpu)
}

/// Every adapter that computes, the best first.
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
    let Some(wanted) = name else {
        return adapters.into_iter().next().ok_or_else(|| unavailable("this machine has no adapter".into()));
    };
    let lower = wanted.to_lowercase();
    let by_number = wanted.parse().ok().filter(|&number: &usize| number < names.len());
    let chosen = by_number.or_else(|| names.iter().position(|name| name.to_lowercase().contains(&lower)));
    let adapter = chosen.and_then(|number| adapters.into_iter().nth(number));
    adapter.ok_or_else(|| unavailable(format!("no adapter is `{wanted}`; there are: {}", names.join(", "))))
}

fn unavailable(reason: String) -> Error {
    Error::Unavailable { backend: "webgpu", reason }
}
