//! `cargo bench --bench mixed`: batches in which each row uses an adapter of its own, beside what they are measured against, in turn.
//!
//! Times are the least of several rounds, and so are the CPU times of all threads, where Linux tells them: on a shared machine the second
//! is the steadier one. `-- ROUNDS THREADS` says how many (20, 2).

use std::time::Instant;

use lowrank::autograd::Tape;
use lowrank::nn::{Adam, Adaptable, LoraConfig, Mlp, Recipe, Sweep, Targets};
use lowrank::op::{Assignment, Bank, Factor, Labels, LinearForward, LoraForward};
use lowrank::random::Rng;
use lowrank::{Cpu, Float, Result, Tensor, bf16};

/// Nanoseconds that the threads of this process have run.
fn cpu_time() -> Option<u64> {
    let tasks = std::fs::read_dir("/proc/self/task").ok()?;
    let of = |task: std::io::Result<std::fs::DirEntry>| {
        let stat = std::fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
        stat.split_whitespace().next()?.parse::<u64>().ok()
    };
    Some(tasks.filter_map(of).sum())
}

/// A name, and the call that is timed.
type Contender<'c> = (&'static str, Box<dyn FnMut() -> Result<()> + 'c>);

/// Runs them in turn, and prints the least time of each, and how often the first fits into it.
fn race(title: &str, rounds: usize, mut contenders: Vec<Contender<'_>>) -> Result<()> {
    let mut best = vec![(f64::INFINITY, f64::INFINITY); contenders.len()];
    for round in 0..=rounds {
        for ((_, run), best) in contenders.iter_mut().zip(&mut best) {
            let (began, cpu) = (Instant::now(), cpu_time());
            run()?;
            let wall = began.elapsed().as_secs_f64();
            let cpu = cpu.zip(cpu_time()).map_or(wall, |(before, after)| (after - before) as f64 * 1e-9);
            if round > 0 {
                *best = (best.0.min(wall), best.1.min(cpu));
            }
        }
    }
    println!("\n{title}\n{:40} {:>10} {:>7} {:>10} {:>7}", "", "wall ms", "ratio", "cpu ms", "ratio");
    for ((name, _), (wall, cpu)) in contenders.iter().zip(&best) {
        println!("{name:40} {:10.3} {:7.3} {:10.3} {:7.3}", wall * 1e3, wall / best[0].0, cpu * 1e3, cpu / best[0].1);
    }
    Ok(())
}

struct Layer<E: Float> {
    x: Tensor<Cpu<E>>,
    w: Tensor<Cpu<E>>,
    bank: Bank<Cpu<E>>,
    /// One for each row: `A r×k` and `B n×r`.
    one_by_one: Vec<[Tensor<Cpu<E>>; 2]>,
}

fn random<E: Float>(len: usize, seed: u64) -> Vec<E> {
    let mut rng = Rng::new(seed);
    (0..len).map(|_| E::from_f32(rng.unit() as f32 - 0.5)).collect()
}

impl<E: Float> Layer<E> {
    fn new(cpu: &Cpu<E>, m: usize, size: usize, r: usize, adapters: usize) -> Result<Self> {
        let mut bank = Bank::new(cpu, adapters, r, (size, size))?;
        let mut one_by_one = Vec::new();
        for slot in 0..adapters {
            let (a, b) = (random::<E>(r * size, 10 + slot as u64), random::<E>(r * size, 500 + slot as u64));
            bank.load(cpu, slot, (&a, &b), 0.5)?;
            one_by_one.push([Tensor::from_slice(cpu, (r, size), &a)?, Tensor::from_slice(cpu, (size, r), &b)?]);
        }
        let x = Tensor::from_slice(cpu, (m, size), &random::<E>(m * size, 1))?;
        let w = Tensor::from_slice(cpu, (size, size), &random::<E>(size * size, 2))?;
        Ok(Self { x, w, bank, one_by_one })
    }

    fn base(&self, cpu: &Cpu<E>, y: &mut Tensor<Cpu<E>>) -> Result<()> {
        LinearForward { x: self.x.view(), w: (&self.w).into(), bias: None, y: y.into() }.run(cpu)
    }

    fn forward(
        &self,
        cpu: &Cpu<E>,
        [a, b]: [Factor<'_, Cpu<E>>; 2],
        h: &mut Tensor<Cpu<E>, f32>,
        y: &mut Tensor<Cpu<E>>,
    ) -> Result<()> {
        let (w, bias, dropout) = (Some((&self.w).into()), None, None);
        LoraForward { x: self.x.view(), w, bias, a, b, scale: 1.0, dropout, h: h.view_mut(), y: y.into() }.run(cpu)
    }

    /// The rows of each adapter gathered, one call for each, and scattered again.
    fn grouped(&self, cpu: &Cpu<E>, rows: &Assignment<Cpu<E>>, y: &mut Tensor<Cpu<E>>) -> Result<()> {
        let (k, n) = (self.x.cols(), self.w.rows());
        for segment in rows.segments() {
            let (of_slot, [a, b]) = (rows.rows_of(segment), &self.one_by_one[segment.slot]);
            let mut x = Tensor::zeros(cpu, (of_slot.len(), k))?;
            let (mut h, mut out) = (Tensor::zeros(cpu, (of_slot.len(), a.rows()))?, Tensor::zeros(cpu, (of_slot.len(), n))?);
            for (i, &row) in of_slot.iter().enumerate() {
                let from = self.x.view().row_range(row as usize..row as usize + 1)?;
                x.view_mut().row_range(i..i + 1)?.copy_from(cpu, from)?;
            }
            let (w, a, b, bias, dropout) = (Some((&self.w).into()), a.into(), b.into(), None, None);
            LoraForward { x: x.view(), w, bias, a, b, scale: 0.5, dropout, h: h.view_mut(), y: (&mut out).into() }.run(cpu)?;
            for (i, &row) in of_slot.iter().enumerate() {
                let to = y.view_mut().row_range(row as usize..row as usize + 1)?;
                to.copy_from(cpu, out.view().row_range(i..i + 1)?)?;
            }
        }
        Ok(())
    }
}

/// So many rows of a layer 4096², with so many adapters of rank 16.
fn rows<E: Float>(rounds: usize, threads: usize, m: usize, adapters: &[usize], grouped: bool) -> Result<()> {
    let cpu = Cpu::<E>::new()?.with_threads(threads)?;
    let (size, r, most) = (4096, 16, adapters.iter().copied().max().unwrap_or(1));
    let layer = Layer::new(&cpu, m, size, r, most)?;
    let (layer, cpu) = (&layer, &cpu);
    let out = || Ok::<_, lowrank::Error>((Tensor::zeros(cpu, (m, r))?, Tensor::zeros(cpu, (m, size))?));
    let assigned = |adapters: usize| {
        let rows: Vec<_> = (0..m).map(|i| Some(i % adapters)).collect();
        Assignment::new(cpu, most, &rows)
    };
    let all = adapters.iter().map(|&count| assigned(count)).collect::<Result<Vec<_>>>()?;
    let (_, mut y) = out()?;
    let mut contenders: Vec<Contender<'_>> = vec![("base layer", Box::new(move || layer.base(cpu, &mut y)))];
    let (mut h, mut y) = out()?;
    let [a, b] = &layer.one_by_one[0];
    let one =
        ("one adapter, not of a bank", Box::new(move || layer.forward(cpu, [a.into(), b.into()], &mut h, &mut y)) as Box<_>);
    contenders.push(one);
    for (&count, rows) in adapters.iter().zip(&all) {
        let (mut h, mut y) = out()?;
        let name = match count {
            1 => "1 adapter of a bank",
            4 => "4 adapters",
            8 => "8 adapters",
            16 => "16 adapters",
            _ => "64 adapters",
        };
        contenders.push((name, Box::new(move || layer.forward(cpu, layer.bank.factors(rows), &mut h, &mut y))));
    }
    if let Some(rows) = all.first().filter(|_| grouped) {
        let (_, mut y) = out()?;
        contenders.push(("the first of these, one call a group", Box::new(move || layer.grouped(cpu, rows, &mut y))));
    }
    let title = format!("{m} rows, 4096×4096, r = 16, {}, {threads} threads", E::DTYPE);
    race(&title, rounds, contenders)
}

/// Adapters of rank 1 on the MNIST model, `each` rows for each, in one batch and one after another.
fn training(rounds: usize, threads: usize, count: usize, each: usize) -> Result<()> {
    let cpu = &Cpu::<f32>::new()?.with_threads(threads)?;
    let (rng, config) = (&mut Rng::new(1), LoraConfig::new(1, 1.0));
    let mut model = Mlp::new(cpu, &[784, 1000, 2000, 10], rng)?;
    model.freeze();
    let base = Mlp::new(cpu, &[784, 1000, 2000, 10], rng)?;
    let names: Vec<String> = (0..count).map(|i| format!("a{i}")).collect();
    for name in &names {
        model.add_adapter(cpu, name, Targets::All, &config, rng)?;
    }
    let recipe = |name: &String| Ok(Recipe { name: name.clone(), config: config.clone(), adam: Adam::new(1e-3)? });
    let mut frozen = base;
    frozen.freeze();
    let mut sweep = Sweep::new(cpu, &frozen, names.iter().map(recipe).collect::<Result<_>>()?, rng)?;
    let (x, labels) = (random::<f32>(count * each * 784, 3), vec![3u32; count * each]);
    let (x, labels) = (&x, &labels);
    let rows: Vec<Option<&str>> = names.iter().flat_map(|name| std::iter::repeat_n(Some(name.as_str()), each)).collect();
    let mut adams = names.iter().map(|_| Adam::new(1e-3)).collect::<Result<Vec<_>>>()?;
    let names = &names;
    let one_by_one = move || {
        for (i, (name, adam)) in names.iter().zip(&mut adams).enumerate() {
            model.set_active(&[name])?;
            let mut tape = Tape::new(cpu);
            let input = tape.input(Tensor::from_slice(cpu, (each, 784), &x[i * each * 784..][..each * 784])?);
            let logits = model.forward(&mut tape, input, None)?;
            tape.cross_entropy(logits, &Labels::new(cpu, 10, &labels[..each])?)?;
            let gradients = tape.backward()?;
            adam.step(cpu, model.params_mut(), &gradients)?;
        }
        Ok(())
    };
    let together = move || {
        let assigned = sweep.assign(cpu, &rows)?;
        let mut tape = Tape::new(cpu);
        let input = tape.input(Tensor::from_slice(cpu, (count * each, 784), x)?);
        let logits = frozen.forward_mixed(&mut tape, input, None, sweep.mixed(&assigned)?)?;
        tape.cross_entropy(logits, &Labels::new(cpu, 10, labels)?)?;
        let gradients = tape.backward()?;
        sweep.step(cpu, &gradients)
    };
    let title = format!("a step of {count} adapters of the MNIST model, {each} rows each, f32, {threads} threads");
    race(&title, rounds, vec![("in one batch", Box::new(together)), ("one after another", Box::new(one_by_one))])
}

fn main() -> Result<()> {
    let numbers: Vec<usize> = std::env::args().filter_map(|argument| argument.parse().ok()).collect();
    let (rounds, threads) = (numbers.first().copied().unwrap_or(20), numbers.get(1).copied().unwrap_or(2));
    rows::<f32>(rounds, threads, 64, &[64, 8, 1], true)?;
    rows::<bf16>(rounds, threads, 64, &[64, 8, 1], false)?;
    rows::<bf16>(rounds, threads, 4, &[4], true)?;
    rows::<bf16>(rounds, threads, 16, &[16], true)?;
    rows::<f32>(rounds, threads, 4, &[4], true)?;
    rows::<f32>(rounds, threads, 16, &[16], true)?;
    for each in [1, 2, 10] {
        training(rounds, threads, 8, each)?;
    }
    Ok(())
}
