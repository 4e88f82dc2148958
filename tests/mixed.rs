//! Batches in which each row uses an adapter of its own: assignments, banks, models with banks, sweeps.

mod support;

use lowrank::autograd::Tape;
use lowrank::nn::{
    Adam, Adaptable, AdapterBank, HostAdapter, HostUpdate, LoraConfig, Mixed, MixedRows, Mlp, Recipe, Scaling, Sweep, Targets,
};
use lowrank::op::{Assignment, Bank, Labels, LoraForward, LoraMerge, Rounding};
use lowrank::random::Rng;
use lowrank::{Cpu, Error, Tensor, bf16};
use proptest::prelude::*;

use support::bounds::assert_exact;
use support::data::{Dims, whole};
use support::suite::{How, Mixed as MixedBatch, run_mixed};

type Device = Cpu<f32>;

fn cpu() -> Device {
    Cpu::new().unwrap().with_threads(2).unwrap()
}

/// Whole numbers in any shape, with any assignment, on one thread and on three: exact, and the same bits.
fn exact_for<E: lowrank::Float>(dims: Dims, slots: usize, seed: u64, picks: &[usize]) {
    let mixed = MixedBatch::new(dims, slots, seed, whole);
    let filled = slots.saturating_sub(1).max(1);
    let rows = (0..dims.m).map(|i| Some(picks[i % picks.len()] % (filled + 1)).filter(|&slot| slot < filled)).collect();
    let mixed = MixedBatch { rows, ..mixed };
    let run = |threads| run_mixed(&Cpu::<E>::new().unwrap().with_threads(threads).unwrap(), &mixed, How::default()).unwrap();
    let (got, want) = (run(1), mixed.run());
    assert_exact("h", &got.h, &want.h);
    assert_exact("y", &got.y, &want.y);
    assert_exact("da", &got.da, &want.da);
    assert_exact("db", &got.db, &want.db);
    assert_exact("dx", &got.dx, &want.dx);
    assert!(got.bits() == run(3).bits());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_assignment_is_exact(
        m in 0usize..70, k in 0usize..90, n in 0usize..90, r in 1usize..20, slots in 1usize..12, seed in 0u64..1000,
        picks in proptest::collection::vec(0usize..12, 1..70),
    ) {
        exact_for::<f32>(Dims { m, k, n, r }, slots, seed, &picks);
        exact_for::<bf16>(Dims { m, k, n, r }, slots, seed, &picks);
    }

    #[test]
    fn segments_are_the_rows_by_slot(slots in 1usize..9, rows in proptest::collection::vec(proptest::option::of(0usize..9), 0..60)) {
        let rows: Vec<Option<usize>> = rows.into_iter().map(|slot| slot.map(|slot| slot % slots)).collect();
        let assignment = Assignment::new(&cpu(), slots, &rows).unwrap();
        let mut seen = vec![None; rows.len()];
        let mut before = None;
        for segment in assignment.segments() {
            prop_assert!(before < Some(segment.slot));
            before = Some(segment.slot);
            let of_slot = assignment.rows_of(segment);
            prop_assert!(!of_slot.is_empty() && of_slot.windows(2).all(|pair| pair[0] < pair[1]));
            of_slot.iter().for_each(|&row| seen[row as usize] = Some(segment.slot));
        }
        prop_assert_eq!(&seen, &rows);
        prop_assert!((0..rows.len()).all(|row| assignment.slot(row) == rows[row]));
    }
}

/// The error of what must be refused, in words.
#[track_caller]
fn refused<T>(result: lowrank::Result<T>) -> String {
    match result {
        Ok(_) => panic!("was not refused"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn what_does_not_fit_a_bank_is_refused() {
    let cpu = cpu();
    let mut bank = Bank::new(&cpu, 2, 3, (4, 5)).unwrap();
    for (slot, a, b, scaling, want) in [
        (2, 10, 8, 1.0, "bank: `slot` is 2, of 2 slots, want below the number of slots"),
        (0, 20, 16, 1.0, "bank: `rank` is 4, want at least 1, and at most 3, as the bank has room for"),
        (0, 0, 0, 1.0, "bank: `rank` is 0, want at least 1, and at most 3, as the bank has room for"),
        (0, 11, 8, 1.0, "bank: `a` is 11 elements, and `b` 8, want 5·r, and 4·r, of one rank r"),
        (0, 10, 12, 1.0, "bank: `a` is 10 elements, and `b` 12, want 5·r, and 4·r, of one rank r"),
        (0, 10, 8, f32::NAN, "bank: `scaling` is NaN, want a finite number"),
    ] {
        assert_eq!(refused(bank.load(&cpu, slot, (&vec![1.0f32; a], &vec![1.0f32; b]), scaling)), want);
        assert!(bank.slot(0).is_none() && bank.slot(1).is_none());
    }
    assert!(Bank::<Device>::new(&cpu, 0, 1, (4, 5)).is_err() && Bank::<Device>::new(&cpu, 1, 0, (4, 5)).is_err());
    assert!(Bank::<Device>::new(&cpu, usize::MAX, 2, (4, 5)).is_err());
    assert!(bank.clear(&cpu, 7).is_err() && bank.load_nothing(&cpu, 7).is_err() && bank.download(&cpu, 1).is_err());
    let got = refused(Assignment::new(&cpu, 2, &[None, Some(1), Some(2)]));
    assert_eq!(got, "assignment: `rows` is slot 2 in row 2, of 2 slots, want below the number of slots");
}

#[test]
fn what_is_loaded_comes_back() {
    let cpu = Cpu::<bf16>::new().unwrap();
    let numbers = |len: usize, first: usize| -> Vec<f32> { (0..len).map(|i| (first + i) as f32).collect() };
    let mut bank = Bank::new(&cpu, 3, 4, (5, 6)).unwrap();
    for (slot, rank) in [(1, 4), (0, 2), (2, 3), (1, 1)] {
        bank.load(&cpu, slot, (&numbers(rank * 6, slot), &numbers(rank * 5, 50 + slot)), 0.5).unwrap();
    }
    for (slot, rank) in [(0, 2), (1, 1), (2, 3)] {
        assert_eq!(bank.download(&cpu, slot).unwrap(), (numbers(rank * 6, slot), numbers(rank * 5, 50 + slot)));
    }
}

#[test]
fn requests_name_the_row_whose_slot_holds_nothing() {
    let cpu = cpu();
    let mut bank = Bank::new(&cpu, 3, 2, (4, 3)).unwrap();
    bank.load(&cpu, 1, (&[1.0f32; 6], &[1.0f32; 8]), 1.0).unwrap();
    let other = Bank::new(&cpu, 3, 2, (4, 3)).unwrap();
    let (x, w) = (Tensor::<Device>::zeros(&cpu, (2, 3)).unwrap(), Tensor::zeros(&cpu, (4, 3)).unwrap());
    let run = |[a, b]: [lowrank::op::Factor<'_, Device>; 2]| {
        let (mut h, mut y) = (Tensor::zeros(&cpu, (2, 2)).unwrap(), Tensor::zeros(&cpu, (2, 4)).unwrap());
        let (x, w, y) = (x.view(), Some((&w).into()), (&mut y).into());
        LoraForward { x, w, bias: None, a, b, scale: 1.0, dropout: None, h: h.view_mut(), y }.run(&cpu)
    };
    let rows = |rows: &[Option<usize>]| Assignment::new(&cpu, 3, rows).unwrap();
    let fine = rows(&[Some(1), None]);
    run(bank.factors(&fine)).unwrap();
    let empty = rows(&[Some(1), Some(2)]);
    let want = "lora_forward: `rows` is slot 2 in row 1, which is empty, want a slot that an adapter was loaded into";
    assert_eq!(refused(run(bank.factors(&empty))), want);
    let three = rows(&[None; 3]);
    assert_eq!(refused(run(bank.factors(&three))), "lora_forward: `rows` is an assignment of 3 rows, want one of 2, as `x` has");
    let larger = Assignment::new(&cpu, 9, &[Some(8), None]).unwrap();
    assert!(refused(run(bank.factors(&larger))).contains("slot 8 in row 0, which the bank does not have"));
    // Of two banks, of two assignments, in the wrong places, and one of one adapter.
    let also_fine = rows(&[Some(1), None]);
    let ([a, b], [_, b_of_other]) = (bank.factors(&fine), other.factors(&fine));
    let [_, b_of_rows] = bank.factors(&also_fine);
    let (one_a, one_b) = (Tensor::<Device>::zeros(&cpu, (2, 3)).unwrap(), Tensor::<Device>::zeros(&cpu, (4, 2)).unwrap());
    for wrong in [[a, b_of_other], [a, b_of_rows], [a, (&one_b).into()], [(&one_a).into(), b]] {
        refused(run(wrong));
    }
    let mut w = Tensor::<Device>::zeros(&cpu, (4, 3)).unwrap();
    let merge = LoraMerge { a, b, scale: 1.0, rounding: Rounding::Nearest, w: w.view_mut() }.run(&cpu);
    assert_eq!(refused(merge), "lora_merge: `a` is a factor for each row, want the factor of one adapter");
}

/// A model with adapters `a0`, `a1`, … of several ranks, which are not all zero.
fn model(count: usize) -> (Mlp<Device>, Vec<(String, HostAdapter)>) {
    let (cpu, rng) = (cpu(), &mut Rng::new(5));
    let model = Mlp::new(&cpu, &[9, 21, 6], rng).unwrap();
    let mut numbers = |len: usize| -> Vec<f32> { (0..len).map(|_| rng.gaussian() as f32 * 0.3).collect() };
    let adapters = (0..count).map(|i| {
        let rank = 1 + i % 3;
        let mut adapter = HostAdapter::default();
        for (layer, n, k) in [("linear1", 21, 9), ("linear2", 6, 21)].into_iter().skip(usize::from(i % 4 == 3)) {
            let update = HostUpdate { a: numbers(rank * k), b: numbers(n * rank), scaling: 0.5 + i as f32 };
            adapter.updates.insert(layer.into(), update);
        }
        (format!("a{i}"), adapter)
    });
    let adapters = adapters.collect();
    (model, adapters)
}

fn batch(rows: usize) -> Tensor<Device> {
    let mut rng = Rng::new(9);
    let x: Vec<f32> = (0..rows * 9).map(|_| rng.gaussian() as f32).collect();
    Tensor::from_slice(&cpu(), (rows, 9), &x).unwrap()
}

fn logits(model: &Mlp<Device>, x: &Tensor<Device>, mixed: Mixed<'_, Device>) -> Vec<f32> {
    let cpu = cpu();
    let mut tape = Tape::new(&cpu);
    let x = tape.input(x.try_clone(&cpu).unwrap());
    let y = model.forward_mixed(&mut tape, x, None, mixed).unwrap();
    tape.value(y).unwrap().to_vec(&cpu).unwrap()
}

fn fetch(adapters: &[(String, HostAdapter)]) -> impl FnMut(&str) -> lowrank::Result<HostAdapter> {
    |name| match adapters.iter().find(|(known, _)| known == name) {
        Some((_, adapter)) => Ok(adapter.clone()),
        None => Err(Error::NoSuchAdapter { name: name.into(), known: String::new() }),
    }
}

/// Few slots serve many adapters: each row is what it is with its adapter alone, whatever was in the slots before.
#[test]
fn few_slots_serve_many_adapters() {
    let (cpu, (model, adapters)) = (cpu(), model(11));
    let mut bank = AdapterBank::new(&cpu, &model, 4, 3).unwrap();
    let (x, mut rng) = (batch(6), Rng::new(2));
    for _ in 0..30 {
        let some: Vec<usize> = (0..4).map(|_| rng.below(11)).collect();
        let names: Vec<Option<&str>> =
            (0..6).map(|_| some.get(rng.below(5)).map(|&adapter| adapters[adapter].0.as_str())).collect();
        let rows = bank.assign(&cpu, &names, fetch(&adapters)).unwrap();
        let got = logits(&model, &x, bank.mixed(&rows).unwrap());
        for (i, name) in names.iter().enumerate() {
            let mut alone = AdapterBank::new(&cpu, &model, 1, 3).unwrap();
            let rows = alone.assign(&cpu, &[*name; 6], fetch(&adapters)).unwrap();
            let want = logits(&model, &x, alone.mixed(&rows).unwrap());
            assert_eq!(got[i * 6..][..6], want[i * 6..][..6], "{name:?} in row {i}");
        }
    }
    let counts = bank.counts();
    assert!(counts.hits > 0 && counts.loads > 11 && counts.evictions == counts.loads - 4, "{counts:?}");
}

#[test]
fn the_one_used_the_longest_ago_makes_room() {
    let (cpu, (model, adapters)) = (cpu(), model(6));
    let mut bank = AdapterBank::new(&cpu, &model, 3, 3).unwrap();
    let use_of = |bank: &mut AdapterBank<Device>, name: &str| drop(bank.assign(&cpu, &[Some(name)], fetch(&adapters)).unwrap());
    ["a0", "a1", "a2", "a0"].iter().for_each(|name| use_of(&mut bank, name));
    use_of(&mut bank, "a3");
    assert!(bank.slot("a1").is_none() && bank.slot("a0").is_some() && bank.slot("a2").is_some());
    bank.set_pinned("a2", true).unwrap();
    use_of(&mut bank, "a4");
    assert!(bank.slot("a0").is_none() && bank.slot("a2").is_some());
    // In use: it stays, is not replaced, and is not evicted by name.
    let rows = bank.assign(&cpu, &[Some("a3"), Some("a4")], fetch(&adapters)).unwrap();
    assert!(
        refused(bank.load(&cpu, "a5", &adapters[5].1)).contains("`a5`, for which there is no slot: all 3 are in use or pinned")
    );
    assert_eq!(
        refused(bank.load(&cpu, "a3", &adapters[3].1)),
        "load: `adapter` is `a3`, which a batch uses, want one that no batch uses"
    );
    assert!(bank.evict(&cpu, "a4").is_err() && bank.evict(&cpu, "nobody").is_err());
    drop(rows);
    bank.load(&cpu, "a3", &adapters[3].1).unwrap();
    bank.evict(&cpu, "a4").unwrap();
    let got = refused(bank.assign_loaded(&cpu, &[None, Some("a4")], 1));
    assert_eq!(got, "assign: `adapter` is `a4` in row 1, which is in no slot, want an adapter that was loaded");
    let too_many = ["a0", "a1", "a2", "a3"].map(Some);
    assert!(refused(bank.assign(&cpu, &too_many, fetch(&adapters))).contains("4 adapters in one batch"));
}

#[test]
fn what_does_not_fit_the_model_is_refused() {
    let (cpu, (model, adapters)) = (cpu(), model(6));
    let mut bank = AdapterBank::new(&cpu, &model, 2, 2).unwrap();
    assert!(refused(bank.load(&cpu, "a2", &adapters[2].1)).ends_with("in `linear1`"), "a rank of 3 in a bank of 2");
    let mut stray = adapters[0].1.clone();
    stray.updates.insert("linear9".into(), adapters[0].1.updates["linear1"].clone());
    assert!(matches!(bank.load(&cpu, "stray", &stray), Err(Error::NoSuchLayer { name, .. }) if name == "linear9"));
    assert_eq!(bank.names().count(), 0);
    let other = AdapterBank::new(&cpu, &model, 2, 2).unwrap();
    let rows: MixedRows<Device> = bank.assign(&cpu, &[Some("a0")], fetch(&adapters)).unwrap();
    assert_eq!(refused(other.mixed(&rows).map(drop)), "mixed: `rows` is assigned by another bank, want assigned by this one");
}

/// Adapters of a model, in one pass, are what they are one by one.
#[test]
fn a_bank_of_a_models_adapters_is_that_model() {
    let (cpu, rng) = (cpu(), &mut Rng::new(3));
    let mut model = Mlp::new(&cpu, &[9, 21, 6], rng).unwrap();
    for (name, rank) in [("ann", 2), ("bob", 3)] {
        model.add_adapter(&cpu, name, Targets::All, &LoraConfig::new(rank, 4.0), rng).unwrap();
    }
    for (_, layer) in model.layers_mut() {
        for (name, part) in [("ann", 0.3), ("bob", -0.2)] {
            let adapter = layer.lora_mut().unwrap();
            for param in adapter.params_mut().filter(|param| param.trainable) {
                let numbers: Vec<f32> = (0..param.count()).map(|_| part * rng.gaussian() as f32).collect();
                param.copy_from_slice(&cpu, &numbers).unwrap();
            }
            adapter.set_active(&[if name == "ann" { "bob" } else { "ann" }]).unwrap();
        }
    }
    let names = [Some("bob"), None, Some("ann"), Some("bob"), None];
    let x = batch(5);
    let got = model.predict_mixed(&cpu, &x, &names).unwrap();
    for (i, name) in names.iter().enumerate() {
        let mut tape = Tape::new(&cpu);
        let x = tape.input(x.try_clone(&cpu).unwrap());
        let adapters = lowrank::nn::Adapters::Named(name.as_slice());
        let y = model.forward_with(&mut tape, x, None, adapters).unwrap();
        let want = tape.value(y).unwrap().to_vec(&cpu).unwrap();
        for (got, want) in got[i * 6..][..6].iter().zip(&want[i * 6..][..6]) {
            assert!((got - want).abs() <= 1e-5 * (1.0 + want.abs()), "{name:?} in row {i}: {got}, want {want}");
        }
    }
}

/// Steps of one adapter of its own batches, alone in a sweep or beside others.
fn trained(names: &[&str], steps: usize, absent: usize) -> Vec<HostAdapter> {
    let (cpu, rng) = (cpu(), &mut Rng::new(11));
    let model = Mlp::new(&cpu, &[9, 16, 4], rng).unwrap();
    let of = |name: &str| name.as_bytes()[0] as usize;
    let recipes = names.iter().map(|name| Recipe {
        name: name.to_string(),
        config: LoraConfig { scaling: Scaling::Raw, ..LoraConfig::new(1 + of(name) % 3, 2.0) },
        adam: Adam::new(1e-3 * of(name) as f32).unwrap(),
    });
    let mut sweep = Sweep::new(&cpu, &model, recipes.collect(), rng).unwrap();
    // The same beginning, whoever else is there.
    for name in names {
        let begin = sweep.adapter(&cpu, name).unwrap();
        sweep.set_adapter(&cpu, name, &numbered(begin, of(name))).unwrap();
    }
    for step in 0..steps {
        let there: Vec<&str> = names.iter().copied().filter(|&name| name != "q" || step != absent).collect();
        let mut rows = Vec::new();
        let (mut x, mut labels) = (Vec::new(), Vec::new());
        for row in 0..4 {
            for name in &there {
                let mut rng = Rng::new((step * 1000 + of(name) * 10 + row) as u64);
                x.extend((0..9).map(|_| rng.gaussian() as f32));
                labels.push(rng.below(4) as u32);
                rows.push(Some(*name));
            }
        }
        let assigned = sweep.assign(&cpu, &rows).unwrap();
        let mut tape = Tape::new(&cpu);
        let x = tape.input(Tensor::from_slice(&cpu, (rows.len(), 9), &x).unwrap());
        let logits = model.forward_mixed(&mut tape, x, None, sweep.mixed(&assigned).unwrap()).unwrap();
        tape.cross_entropy(logits, &Labels::new(&cpu, 4, &labels).unwrap()).unwrap();
        let gradients = tape.backward().unwrap();
        sweep.step(&cpu, &gradients).unwrap();
    }
    names.iter().map(|name| sweep.adapter(&cpu, name).unwrap()).collect()
}

/// Numbers that depend on the name alone.
fn numbered(mut adapter: HostAdapter, seed: usize) -> HostAdapter {
    let mut rng = Rng::new(seed as u64);
    for update in adapter.updates.values_mut() {
        update.a.iter_mut().chain(&mut update.b).for_each(|number| *number = 0.2 * rng.gaussian() as f32);
    }
    adapter
}

/// Training in company is training alone: own learning rate, own count of steps, also where one misses a step.
#[test]
fn adapters_in_one_batch_train_as_each_alone() {
    let together = trained(&["p", "q", "r"], 6, 2);
    for (name, got) in ["p", "q", "r"].iter().zip(&together) {
        let alone = if *name == "q" { trained_without_step(2) } else { trained(&[name], 6, usize::MAX) };
        let want = alone.first().unwrap();
        for (layer, update) in &got.updates {
            let want = &want.updates[layer];
            for (got, want) in update.a.iter().chain(&update.b).zip(want.a.iter().chain(&want.b)) {
                assert!((got - want).abs() <= 2e-4 * (1.0 + want.abs()), "{name}, {layer}: {got}, want {want}");
            }
        }
    }
}

/// `q` alone, without one of the six steps.
fn trained_without_step(absent: usize) -> Vec<HostAdapter> {
    // A batch of no rows at all would have no loss: another adapter keeps the step company.
    trained(&["q", "z"], 6, absent)
}
