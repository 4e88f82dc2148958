//! Quantised weights beside dense ones: decoding and prefill of a layer `4096 → 4096` with an adapter of rank 16, by turns in one run.
//!
//! `cargo bench --bench quantised`

use std::time::Instant;

use lowrank::op::{LoraBackward, LoraForward, Weight};
use lowrank::quant::{Blocks, QuantKind, Quantised};
use lowrank::random::Rng;
use lowrank::{Backend, Cpu, Float, Tensor, bf16};

const SIDE: usize = 4096;
const RANK: usize = 16;

/// A layer, its input, and room for what it computes.
struct Layer<E: Float> {
    cpu: Cpu<E>,
    dense: Tensor<Cpu<E>>,
    quantised: Vec<Quantised<Cpu<E>>>,
    x: Tensor<Cpu<E>>,
    y: Tensor<Cpu<E>>,
    a: Tensor<Cpu<E>>,
    b: Tensor<Cpu<E>>,
    h: Tensor<Cpu<E>, f32>,
    da: Tensor<Cpu<E>, f32>,
    db: Tensor<Cpu<E>, f32>,
    dx: Tensor<Cpu<E>>,
}

impl<E: Float> Layer<E> {
    fn new(rows: usize, kinds: &[QuantKind]) -> lowrank::Result<Self> {
        let (cpu, mut rng) = (Cpu::<E>::new()?, Rng::new(1));
        let mut random = |shape: (usize, usize)| {
            let numbers: Vec<E> = (0..shape.0 * shape.1).map(|_| E::from_f32(rng.unit() as f32 - 0.5)).collect();
            Tensor::from_slice(&cpu, shape, &numbers)
        };
        let dense = random((SIDE, SIDE))?;
        let (x, y, dx) = (random((rows, SIDE))?, random((rows, SIDE))?, random((rows, SIDE))?);
        let (a, b) = (random((RANK, SIDE))?, random((SIDE, RANK))?);
        let quantised = kinds.iter().map(|&kind| Quantised::quantise(&cpu, &dense, kind)).collect::<lowrank::Result<_>>()?;
        let h = Tensor::zeros(&cpu, (rows, RANK))?;
        let (da, db) = (Tensor::zeros(&cpu, (RANK, SIDE))?, Tensor::zeros(&cpu, (SIDE, RANK))?);
        Ok(Self { cpu, dense, quantised, x, y, a, b, h, da, db, dx })
    }

    /// Seconds of a forward pass, and of a backward pass if it is asked for.
    fn time(&mut self, which: Option<usize>, backward: bool) -> lowrank::Result<f64> {
        let Self { cpu, dense, quantised, x, y, a, b, h, da, db, dx } = self;
        let w: Weight<'_, Cpu<E>> = which.map_or_else(|| (&*dense).into(), |i| (&quantised[i]).into());
        let began = Instant::now();
        let forward = LoraForward {
            x: x.view(),
            w: Some(w),
            bias: None,
            a: (&*a).into(),
            b: (&*b).into(),
            scale: 0.5,
            dropout: None,
            h: h.view_mut(),
            y: y.into(),
        };
        forward.run(cpu)?;
        if backward {
            let backward = LoraBackward {
                x: x.view(),
                w: Some(w),
                a: (&*a).into(),
                b: (&*b).into(),
                h: h.view(),
                dy: x.view(),
                scale: 0.5,
                dropout: None,
                da: da.view_mut(),
                db: db.view_mut(),
                dbias: None,
                dx: Some(dx.into()),
            };
            backward.run(cpu)?;
        }
        Ok(began.elapsed().as_secs_f64())
    }
}

/// The least time of each, taken by turns.
fn least<E: Float>(rows: usize, kinds: &[QuantKind], rounds: usize, backward: bool) -> lowrank::Result<Vec<f64>> {
    let mut layer = Layer::<E>::new(rows, kinds)?;
    let mut least = vec![f64::MAX; kinds.len() + 1];
    for _ in 0..rounds {
        for (i, least) in least.iter_mut().enumerate() {
            *least = least.min(layer.time(i.checked_sub(1), backward)?);
        }
    }
    Ok(least)
}

fn report(what: &str, dense: &str, kinds: &[QuantKind], times: &[f64]) {
    println!("{what}: {dense} {:.3} ms", 1e3 * times[0]);
    for (kind, time) in kinds.iter().zip(&times[1..]) {
        println!("  {kind:?}: {:.3} ms, {dense} takes {:.2}×", 1e3 * time, times[0] / time);
    }
}

fn main() -> lowrank::Result<()> {
    let single = QuantKind::Nf4(Blocks { len: 64, double: false });
    let kinds = [QuantKind::NF4, single, QuantKind::Int8, QuantKind::Q8_0];
    println!("{}", Cpu::<f32>::new()?.device());
    for rows in [1, 2, 4, 8, 16] {
        report(&format!("{rows} rows"), "bf16", &kinds, &least::<bf16>(rows, &kinds, 200, false)?);
    }
    report("512 rows", "f32", &kinds, &least::<f32>(512, &kinds, 7, false)?);
    report("512 rows, forward and backward", "f32", &kinds, &least::<f32>(512, &kinds, 5, true)?);
    Ok(())
}
