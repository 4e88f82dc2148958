//! A file of compiled pipelines for the next run: the driver's data, behind a header that detects damage.
//!
//! ```text
//! "lowrank" 1 · adapter · length · checksum │ data        8 bytes each, little-endian
//! ```

use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use super::dispatch::Gpu;
use crate::error::{Error, Result};
use crate::file;

/// The feature that an adapter needs; among wgpu's backends only Vulkan has it.
pub(super) const REQUIRED_FEATURES: wgpu::Features = wgpu::Features::PIPELINE_CACHE;

/// The name of the format, and its version.
const MAGIC: [u8; 8] = *b"lowrank\x01";

/// The file of an adapter's pipelines.
pub(super) struct Cache {
    path: PathBuf,
    /// A hash of the adapter and its driver.
    adapter: u64,
    pub(super) raw: wgpu::PipelineCache,
    /// True if pipelines were compiled that the file may not have.
    is_stale: AtomicBool,
}

impl Cache {
    /// Loads the file if it exists, is undamaged and belongs to this adapter; else starts empty.
    pub(super) fn open(gpu: &Gpu, path: PathBuf) -> Result<Self> {
        let file = match std::fs::read(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
            read => read.map_err(|error| file::failed(&path, error))?,
        };
        let adapter = identity(&gpu.device.adapter_info());
        let raw = gpu.guarded(0, || with_data(&gpu.device, unpack(&file, adapter)))?;
        Ok(Self { path, adapter, raw, is_stale: AtomicBool::new(false) })
    }

    /// Notes that a pipeline was compiled.
    pub(super) fn mark_stale(&self) {
        self.is_stale.store(true, Ordering::Relaxed);
    }

    /// Writes the file, completely or not at all, if there are new pipelines.
    pub(super) fn save(&self) -> Result<()> {
        if !self.is_stale.swap(false, Ordering::Relaxed) {
            return Ok(());
        }
        self.write().inspect_err(|_| self.mark_stale())
    }

    fn write(&self) -> Result<()> {
        let none = || Error::Device { backend: "webgpu", reason: "the driver does not return its pipelines".into() };
        let data = self.raw.get_data().ok_or_else(none)?;
        file::write_whole(&self.path, &pack(&data, self.adapter))
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        let _ = self.save(); // errors cannot be returned here; `save_pipelines` returns them
    }
}

#[allow(unsafe_code, reason = "wgpu cannot know who wrote a file")]
fn with_data(device: &wgpu::Device, data: Option<&[u8]>) -> wgpu::PipelineCache {
    let descriptor = wgpu::PipelineCacheDescriptor { label: Some("lowrank"), data, fallback: true };
    // SAFETY: the data must be what `get_data` returned. `unpack` returns only what `save` wrote for this adapter and driver,
    // with length and checksum unchanged, and wgpu compares the driver's own identifier too. Against deliberate changes there is
    // no proof: the caller of `with_pipelines` was told to keep the file where nobody else may write.
    unsafe { device.create_pipeline_cache(&descriptor) }
}

/// A hash of an adapter, its driver and the driver's version.
fn identity(info: &wgpu::AdapterInfo) -> u64 {
    let wgpu::AdapterInfo { name, vendor, device, driver, driver_info, backend, .. } = info;
    checksum(format!("{backend} {vendor} {device} {name} {driver} {driver_info}").as_bytes())
}

/// FNV-1a: detects every change of one byte, and larger damage except with probability 2⁻⁶⁴.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, &byte| (sum ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// The bytes of the file.
fn pack(data: &[u8], adapter: u64) -> Vec<u8> {
    let numbers = [adapter, data.len() as u64, checksum(data)].map(u64::to_le_bytes);
    [&MAGIC, numbers.as_flattened(), data].concat()
}

/// The data of a file that is undamaged and belongs to this adapter.
fn unpack(file: &[u8], adapter: u64) -> Option<&[u8]> {
    let data = file.get(32..)?;
    let header = [adapter, data.len() as u64, checksum(data)].map(u64::to_le_bytes);
    (file[..8] == MAGIC && file[8..32] == *header.as_flattened()).then_some(data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_gives_back_its_data_to_its_adapter_alone() {
        for data in [&b""[..], b"pipelines"] {
            let file = pack(data, 7);
            assert_eq!(unpack(&file, 7), Some(data));
            assert_eq!(unpack(&file, 8), None);
        }
    }

    #[test]
    fn a_file_that_is_cut_longer_or_changed_anywhere_gives_nothing() {
        let file = pack(b"pipelines", 7);
        for len in 0..file.len() {
            assert_eq!(unpack(&file[..len], 7), None, "{len} bytes of it");
        }
        assert_eq!(unpack(&[&file[..], b"!"].concat(), 7), None);
        for place in 0..file.len() {
            for bit in 0..8 {
                let mut changed = file.clone();
                changed[place] ^= 1 << bit;
                assert_eq!(unpack(&changed, 7), None, "bit {bit} of byte {place}");
            }
        }
    }
}
