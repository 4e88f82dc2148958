//! Every shape and verb on each machine: everyone is checked, then everyone is timed.

use std::time::Instant;

use lowrank::{Backend, DType, Float, Result};

use crate::check::Expected;
use crate::layer::{Contender, Layer, Verb};
use crate::measure::rounds;
use crate::options::Options;
use crate::peaks::{Peaks, Share};
use crate::rivals::{ours::Ours, unfused::Unfused};
use crate::table::{Report, Row};

/// Contenders, the first of them ours.
pub type Contenders<B> = Vec<Box<dyn Contender<B>>>;

/// Who else computes where a backend does, and by which clock.
pub trait Others<B: Backend> {
    /// The backend, as the rows of JSON call it.
    const BACKEND: &'static str;

    /// Those besides lowrank itself.
    fn contenders(&self, layer: &Layer<B>, verb: Verb) -> Result<Contenders<B>>;

    /// Seconds that `work` takes until it is done.
    fn seconds(&self, backend: &B, work: &mut dyn FnMut()) -> f64 {
        let began = Instant::now();
        work();
        backend.synchronize().expect("the device is there");
        began.elapsed().as_secs_f64()
    }
}

/// Columns of every table: lowrank's own verbs, the adapter as layers of its own; its base layer without the adapter; and its verb
/// with the frozen weight kept packed.
pub const OWN: [&str; 3] = ["unfused", "plain", "packed"];

/// The most rows for which the CPU packs no weights; with more it packs those of the forward pass.
const FEW_ROWS: usize = 16;

/// Everyone, for one verb on one layer.
pub fn contenders<B: Backend + Clone + 'static, O: Others<B>>(others: &O, layer: &Layer<B>, verb: Verb) -> Result<Contenders<B>> {
    let mut all: Contenders<B> = vec![Box::new(Ours::new("lowrank", layer, verb)?)];
    all.extend(others.contenders(layer, verb)?);
    if matches!(verb, Verb::LoraForward | Verb::LoraForwardBackward) {
        all.push(Box::new(Unfused::new(layer, verb)?));
        if O::BACKEND == "cpu" && layer.shape.m > FEW_ROWS {
            all.push(Box::new(Ours::packed("packed", layer, verb)?));
        }
    }
    if verb == Verb::LoraForward {
        all.push(Box::new(Ours::new("plain", layer, Verb::LinearForward)?)); // what the adapter costs
    }
    Ok(all)
}

/// Every shape and verb, each on every one of the machines, with their peaks.
pub fn race<B: Backend + Clone + 'static>(
    options: &Options,
    others: &impl Others<B>,
    machines: Vec<(B, Peaks)>,
    report: &mut Report,
) -> Result<()> {
    let Some((first, _)) = machines.first() else { return Ok(()) };
    for shape in options.shapes() {
        let mut layer = Layer::new(first.clone(), shape)?;
        for &verb in options.verbs() {
            let expected = Expected::of(verb, &layer);
            for (backend, peaks) in &machines {
                layer.backend = backend.clone();
                report.add(race_once(options, others, &layer, verb, &expected, peaks)?);
            }
        }
    }
    Ok(())
}

/// Checks everyone, then times everyone.
fn race_once<B: Backend + Clone + 'static, O: Others<B>>(
    options: &Options,
    others: &O,
    layer: &Layer<B>,
    verb: Verb,
    expected: &Expected,
    peaks: &Peaks,
) -> Result<Row> {
    let mut contenders = contenders(others, layer, verb)?;
    contenders.retain(|contender| contender.name() == "lowrank" || options.wants(contender.name()));
    for contender in &mut contenders {
        contender.run(layer);
        if contender.verb() != verb {
            continue; // not a rival: a part of it
        }
        expected.check(contender.name(), &contender.outputs(layer), contender.roundings());
    }
    let names: Vec<_> = contenders.iter().map(|contender| contender.name().to_owned()).collect();
    let mut runs: Vec<Box<dyn FnMut()>> = Vec::new();
    for contender in &mut contenders {
        runs.push(Box::new(|| contender.run(layer)));
    }
    let (shape, elem) = (layer.shape, size_of::<B::Elem>());
    let bytes = verb.elements(shape) * elem as f64;
    let bound = peaks.bound(verb.flop(shape), bytes, verb == Verb::LoraMerge, B::Elem::DTYPE == DType::BF16);
    let clock = |work: &mut dyn FnMut()| others.seconds(&layer.backend, work);
    let (timed, share) = rounds(&clock, &mut runs, &|| bound.seconds(peaks), options.effort());
    drop(runs);
    let share = Share { peak: bound.peak.name(), share };
    let timed = names.into_iter().zip(timed).collect();
    Ok(Row { verb, backend: O::BACKEND, dtype: B::Elem::DTYPE.to_string(), shape, threads: peaks.threads, share, timed })
}
