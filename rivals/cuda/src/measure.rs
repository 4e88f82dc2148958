//! Graphs of many calls, interleaved, timed by events: what the host does between launches does not count.

use std::error::Error;
use std::sync::Arc;

use cudarc::driver::sys::{CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaGraph, CudaStream};

/// A contender: its name, and what makes call number `i`.
pub type Call<'c> = (&'static str, Box<dyn FnMut(usize) -> Result<(), Box<dyn Error>> + 'c>);

/// Calls in a graph.
const CALLS: usize = 24;

/// Median seconds a call, of each. Every round runs everyone once and begins with another one.
pub fn medians(stream: &Arc<CudaStream>, calls: &mut [Call<'_>], rounds: usize) -> Result<Vec<f64>, Box<dyn Error>> {
    let mut graphs = Vec::new();
    for (name, call) in calls.iter_mut() {
        call(0).map_err(|error| format!("{name}: {error}"))?; // what is made at the first call is not captured
        stream.synchronize()?;
        graphs.push(capture(stream, call).map_err(|error| format!("{name}, captured: {error}"))?);
    }
    let mut samples = vec![Vec::new(); graphs.len()];
    for round in 0..rounds + 1 {
        for turn in 0..graphs.len() {
            let who = (turn + round) % graphs.len();
            let seconds = timed(stream, &graphs[who])?;
            if round > 0 {
                samples[who].push(seconds / CALLS as f64);
            }
        }
    }
    Ok(samples.into_iter().map(median).collect())
}

fn capture(
    stream: &Arc<CudaStream>,
    call: &mut dyn FnMut(usize) -> Result<(), Box<dyn Error>>,
) -> Result<CudaGraph, Box<dyn Error>> {
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
    let called = (0..CALLS).try_for_each(call);
    let graph = stream.end_capture(CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH);
    called?;
    Ok(graph?.ok_or("nothing was captured")?)
}

fn timed(stream: &Arc<CudaStream>, graph: &CudaGraph) -> Result<f64, Box<dyn Error>> {
    let begin = stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?;
    graph.launch()?;
    let end = stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?;
    Ok(f64::from(begin.elapsed_ms(&end)?) / 1e3)
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_unstable_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}
