//! candle beside lowrank, one process, interleaved runs: a LoRA layer written by hand on candle's tensors.
//!
//! `cargo run --release -- [--quick] [--json FILE] [--shape NAME]` in this folder. `RAYON_NUM_THREADS` sets the threads of both.
//! The checks, the clock and the inputs are those of rivals/.

#[path = "../../../../tests/support/bounds.rs"]
#[allow(dead_code, reason = "a part of it is enough")]
mod bounds;
#[path = "../../../../rivals/src/check.rs"]
mod check;
#[path = "../../../../rivals/src/layer.rs"]
mod layer;
#[path = "../../../../rivals/src/measure.rs"]
mod measure;
#[path = "../../../../tests/support/oracle.rs"]
#[allow(dead_code, reason = "a part of it is enough")]
mod oracle;
#[path = "../../../../rivals/src/rivals/ours.rs"]
mod ours;
#[path = "../../../shapes/mod.rs"]
mod shapes;

use std::path::PathBuf;

use candle_core::{Device, Result, Tensor, Var, utils::get_num_threads};
use clap::Parser;
use serde_json::json;

use check::Expected;
use layer::{Contender, Layer, Outputs, SCALE, Verb};
use measure::{Effort, medians};
use ours::Ours;
use shapes::Shape;

/// candle beside lowrank.
#[derive(Parser)]
struct Args {
    /// A few rounds instead of many
    #[arg(long)]
    quick: bool,
    /// Writes the rows here as well
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Only these shapes
    #[arg(long, value_name = "NAME")]
    shape: Vec<String>,
}

/// The layer in candle's tensors, and what its last run put out.
struct Candle {
    verb: Verb,
    x: Var,
    a: Var,
    b: Var,
    w: Tensor,
    dy: Tensor,
    y: Option<Tensor>,
    /// Of A, B and x.
    gradients: Option<[Tensor; 3]>,
}

impl Candle {
    fn new(layer: &Layer<f32>, verb: Verb) -> Result<Self> {
        let tensor = |of: &lowrank::Tensor<lowrank::Cpu<f32>>| Tensor::from_slice(of.buffer(), (of.rows(), of.cols()), &Device::Cpu);
        let var = |of| Var::from_tensor(&tensor(of)?);
        let (x, a, b) = (var(&layer.x)?, var(&layer.a)?, var(&layer.b)?);
        Ok(Self { verb, x, a, b, w: tensor(&layer.w)?, dy: tensor(&layer.dy)?, y: None, gradients: None })
    }

    /// `y = x·Wᵀ + scale·(x·Aᵀ)·Bᵀ`; nobody asks for gradients of what is detached.
    fn forward(&self, [x, a, b]: [&Tensor; 3]) -> Result<Tensor> {
        let base = x.matmul(&self.w.t()?)?;
        let update = x.matmul(&a.t()?)?.matmul(&b.t()?)?;
        base + (update * f64::from(SCALE))?
    }

    fn compute(&mut self) -> Result<()> {
        if self.verb == Verb::LoraForward {
            let detached = [&self.x, &self.a, &self.b].map(|var| var.as_detached_tensor());
            self.y = Some(self.forward(detached.each_ref())?);
            return Ok(());
        }
        let y = self.forward([&self.x, &self.a, &self.b])?;
        // A loss whose gradient with respect to y is dy.
        let gradients = (&y * &self.dy)?.sum_all()?.backward()?;
        let of = |var: &Var| gradients.get(var).cloned().expect("it has a gradient");
        self.gradients = Some([of(&self.a), of(&self.b), of(&self.x)]);
        self.y = Some(y);
        Ok(())
    }
}

impl Contender<f32> for Candle {
    fn name(&self) -> &'static str {
        "candle"
    }

    fn verb(&self) -> Verb {
        self.verb
    }

    fn run(&mut self, _: &Layer<f32>) {
        self.compute().expect("candle");
    }

    fn outputs(&self, _: &Layer<f32>) -> Outputs {
        let values = |tensor: &Tensor| tensor.flatten_all().and_then(|flat| flat.to_vec1()).expect("f32");
        let y = self.y.as_ref().map(values).unwrap_or_default();
        let [da, db, dx] = self.gradients.as_ref().map(|all| all.each_ref().map(values)).unwrap_or_default();
        Outputs { y, da, db, dx, w: Vec::new() }
    }
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    let effort = if args.quick { Effort::QUICK } else { Effort::FULL };
    let threads = get_num_threads();
    let mut rows = Vec::new();
    println!("| verb | shape | r | threads | candle | over lowrank |\n|---|---|---|---|---|---|");
    for shape in Shape::all().into_iter().filter(|shape| args.shape.is_empty() || args.shape.iter().any(|name| name == shape.name)) {
        let layer = Layer::<f32>::new(shape)?.with_threads(threads)?;
        for verb in [Verb::LoraForward, Verb::LoraForwardBackward] {
            let expected = Expected::of(verb, &layer);
            let mut both: [Box<dyn Contender<f32>>; 2] = [Box::new(Candle::new(&layer, verb)?), Box::new(Ours::new("lowrank", &layer, verb)?)];
            for contender in &mut both {
                contender.run(&layer);
                expected.check(contender.name(), &contender.outputs(&layer), contender.roundings());
            }
            let layer = &layer;
            let mut runs: Vec<Box<dyn FnMut() + '_>> = Vec::new();
            for contender in &mut both {
                runs.push(Box::new(move || contender.run(layer)));
            }
            let seconds = medians(&mut runs, effort);
            let (ms, ratio) = (1e3 * seconds[0], seconds[0] / seconds[1]);
            println!("| {verb} | {} {}x{}x{} | {} | {threads} | {ms:.3} ms | {ratio:.2}× |", shape.name, shape.m, shape.k, shape.n, shape.r);
            rows.push(json!({
                "verb": verb.to_string(), "backend": "candle", "dtype": "f32", "shape": shape.name, "rank": shape.r,
                "threads": threads, "seconds": seconds[0], "peak_share": null, "rivals": { "lowrank": seconds[1] },
            }));
        }
    }
    if let Some(path) = args.json {
        std::fs::write(path, serde_json::to_string_pretty(&rows)? + "\n")?;
    }
    Ok(())
}
