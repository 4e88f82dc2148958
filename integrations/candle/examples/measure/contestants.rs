//! Those who make training steps.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use clap::ValueEnum;
use lowrank_candle::data::{Batch, BatchSettings, Dataset};
use lowrank_candle::schedule::{Decay, Warmup};
use lowrank_candle::sft::{Sft, Trainer};
use lowrank_candle::{CausalLm, Pass};
use serde_json::Value;

use crate::by_hand::ByHand;
use crate::table::Clock;
use crate::{Args, Result};

const LR: f64 = 2e-4;

/// Makes training steps.
pub(crate) trait Contestant {
    /// One step: the loss, and how many seconds it took by the clock that was asked for.
    fn step(&mut self) -> Result<(f64, f64)>;
    /// Bytes of the gradients that a backward pass leaves, if they can be counted.
    fn kept(&mut self) -> Result<Option<usize>>;
    /// The greatest memory of its process so far, in bytes.
    fn peak(&mut self) -> Result<u64>;
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub(crate) enum Who {
    Ours,
    ByHand,
    Peft,
}

impl Who {
    /// A contestant with this model, or one of its shape, and the one conversation of the data.
    pub(crate) fn enter<'m>(
        self,
        model: Option<&'m CausalLm>,
        data: &'m Dataset,
        args: &Args,
    ) -> Result<Box<dyn Contestant + 'm>> {
        Ok(match (self, model) {
            (Who::Peft, _) => Box::new(Peft::new(args)?),
            (Who::Ours, Some(model)) => Box::new(Ours::new(model, data, args)?),
            (Who::ByHand, Some(model)) => Box::new(InCandle::new(model, data, args)?),
            (Who::Ours | Who::ByHand, None) => return Err("there is no model".into()),
        })
    }
}

/// This crate.
struct Ours<'m> {
    model: &'m CausalLm,
    data: &'m Dataset,
    trainer: Trainer<'m>,
    clock: Clock,
}

impl<'m> Ours<'m> {
    fn new(model: &'m CausalLm, data: &'m Dataset, args: &Args) -> Result<Self> {
        let batches = BatchSettings { rows: 1, packing: None, epochs: args.rounds + 1, shuffle: None };
        let sft = Sft { lr: LR, warmup: Warmup::Steps(0), decay: Decay::Constant, batches, clip: None, ..Sft::default() };
        Ok(Self { model, data, trainer: Trainer::new(model, data, sft)?, clock: args.clock() })
    }
}

impl Contestant for Ours<'_> {
    fn step(&mut self) -> Result<(f64, f64)> {
        let begin = self.clock.now()?;
        let step = self.trainer.step()?.ok_or("the run is over")?;
        Ok((step.loss, self.clock.now()? - begin))
    }

    fn kept(&mut self) -> Result<Option<usize>> {
        let batch = Batch::new([(0, &self.data.examples()[0])]);
        let loss = self.model.loss(&batch.tokens, &batch.labels, batch.counted() as f32, &Pass::training(0))?;
        Ok(Some(bytes(&loss.backward()?)))
    }

    fn peak(&mut self) -> Result<u64> {
        own_peak()
    }
}

/// LoRA by hand, candle's operations and its AdamW.
struct InCandle<'m> {
    model: ByHand,
    adamw: AdamW,
    ids: &'m [u32],
    clock: Clock,
}

impl<'m> InCandle<'m> {
    fn new(model: &CausalLm, data: &'m Dataset, args: &Args) -> Result<Self> {
        let model = ByHand::of(model)?;
        let adamw = AdamW::new(model.vars(), ParamsAdamW { lr: LR, weight_decay: 0.0, ..Default::default() })?;
        Ok(Self { model, adamw, ids: &data.examples()[0].ids, clock: args.clock() })
    }
}

impl Contestant for InCandle<'_> {
    fn step(&mut self) -> Result<(f64, f64)> {
        let begin = self.clock.now()?;
        let loss = self.model.loss(self.ids)?;
        self.adamw.step(&loss.backward()?)?;
        Ok((f64::from(loss.to_scalar::<f32>()?), self.clock.now()? - begin))
    }

    fn kept(&mut self) -> Result<Option<usize>> {
        Ok(Some(bytes(&self.model.loss(self.ids)?.backward()?)))
    }

    fn peak(&mut self) -> Result<u64> {
        own_peak()
    }
}

/// What candle's backward pass leaves.
fn bytes(gradients: &candle_core::backprop::GradStore) -> usize {
    let tensors = gradients.get_ids().filter_map(|&id| gradients.get_id(id));
    tensors.map(|gradient| gradient.elem_count() * gradient.dtype().size_in_bytes()).sum()
}

/// The greatest memory of this process so far. Linux tells it.
fn own_peak() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let kib = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"));
    Ok(1024 * kib.ok_or("/proc/self/status has no VmHWM")?.trim().parse::<u64>()?)
}

/// transformers and PEFT: a process that makes a step for each line it gets.
struct Peft {
    process: Child,
    orders: ChildStdin,
    reports: BufReader<ChildStdout>,
    peak: u64,
    clock: Clock,
}

impl Peft {
    fn new(args: &Args) -> Result<Self> {
        let python = args.python.as_deref().unwrap_or("python3");
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/measure-peft.py");
        let mut command = Command::new(python);
        command.arg(script).args([args.tokens, args.layers].map(|n| n.to_string()));
        if args.cpu_time {
            command.arg("1"); // threads
        }
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (orders, reports) = (process.stdin.take(), process.stdout.take());
        let (Some(orders), Some(reports)) = (orders, reports) else { return Err("no pipes to Python".into()) };
        let mut peft = Self { process, orders, reports: BufReader::new(reports), peak: 0, clock: args.clock() };
        println!("{}", peft.report()?);
        Ok(peft)
    }

    fn report(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.reports.read_line(&mut line)?;
        Ok(serde_json::from_str(&line).map_err(|_| "the Python process ended")?)
    }
}

impl Contestant for Peft {
    fn step(&mut self) -> Result<(f64, f64)> {
        writeln!(self.orders)?;
        self.orders.flush()?;
        let report = self.report()?;
        let number = |key: &str| report[key].as_f64().ok_or(format!("no `{key}` from Python"));
        self.peak = number("peak")? as u64;
        std::thread::sleep(Duration::from_millis(300)); // its threads spin for a while
        Ok((number("loss")?, number(if self.clock == Clock::Cpu { "cpu_seconds" } else { "seconds" })?))
    }

    fn kept(&mut self) -> Result<Option<usize>> {
        Ok(None)
    }

    fn peak(&mut self) -> Result<u64> {
        Ok(self.peak)
    }
}

impl Drop for Peft {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
