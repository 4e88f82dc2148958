//! Measures time by the device's clock, without recording and waiting on the host.

use std::time::Duration;

use super::WebGpu;
use super::dispatch::Command;
use super::memory::{Memory, STAGING, lock};
use crate::element::Float;
use crate::error::{Error, Result};

/// The features that an adapter needs.
pub(super) const REQUIRED_FEATURES: wgpu::Features =
    wgpu::Features::TIMESTAMP_QUERY.union(wgpu::Features::TIMESTAMP_QUERY_INSIDE_ENCODERS);

impl<E: Float> WebGpu<E> {
    /// Measures how long the device takes for the commands that `work` records, from the first launch to the last. Waits for
    /// them.
    ///
    /// Commands that other threads record meanwhile are included. Errors: those of `work`; [`Error::Unavailable`] if the adapter
    /// has no timestamps between launches.
    pub fn device_time(&self, work: impl FnOnce() -> Result<()>) -> Result<Duration> {
        if !self.gpu.device.features().contains(REQUIRED_FEATURES) {
            let reason = format!("{} has no timestamps between launches", self.gpu.name);
            return Err(Error::Unavailable { backend: "webgpu", reason });
        }
        let label = Some("clock");
        let queries = self.gpu.guarded(0, || {
            self.gpu.device.create_query_set(&wgpu::QuerySetDescriptor { label, ty: wgpu::QueryType::Timestamp, count: 2 })
        })?;
        let size = 2 * u64::from(wgpu::QUERY_SIZE);
        let ticks = self.gpu.create_buffer(wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC, size)?;
        let stamp = |index| lock(&self.gpu.batch).commands.push(Command::Stamp { queries: queries.clone(), index });

        self.gpu.synchronize()?;
        stamp(0);
        let worked = work();
        stamp(1);
        lock(&self.gpu.batch).commands.push(Command::Resolve { queries: queries.clone(), to: ticks.clone() });
        let (staging, _) = Memory::take(&self.gpu, STAGING, size)?;
        let mut read = [0u64; 2];
        self.gpu.read(&ticks, &staging.raw, size, bytemuck::cast_slice_mut(&mut read))?;
        worked?;
        let nanoseconds = read[1].saturating_sub(read[0]) as f64 * f64::from(self.gpu.queue.get_timestamp_period());
        Ok(Duration::from_nanos(nanoseconds as u64))
    }
}
