//! Long runs in which adapters come and go: memory stays flat, and every round has the bits of the first.
//!
//! The long ones, a million steps of decoding and ten thousand of training:
//! `cargo test --release -p lowrank-tests --test soak -- --ignored --nocapture`

mod support;

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Mutex;
use std::time::Instant;

use lowrank::autograd::{Gradients, Tape};
use lowrank::nn::{Adam, Adaptable, LoraConfig, Merge, Mlp, Targets};
use lowrank::op::Labels;
use lowrank::random::Rng;
use lowrank::{Cpu, Float, Result, Tensor, bf16};
use support::adapters::{SIZES, base_bits, cpu, net, trained};

/// Steps of a round; after it the model is as it was before.
const ROUND: usize = 100;

/// The resident memory of this process in KiB; 0 where there is no `/proc`.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

fn hash_bits<E: Float>(hasher: &mut DefaultHasher, numbers: &[E]) {
    bytemuck::cast_slice::<E, u8>(numbers).hash(hasher);
}

/// Adapters of three ranks are inserted, used for rows side by side, merged, unmerged, swapped and deleted.
fn decode<E: Float>(cpu: &Cpu<E>, model: &mut Mlp<Cpu<E>>) -> Result<u64> {
    let (mut hasher, mut rng) = (DefaultHasher::new(), Rng::new(1));
    let config = |rank: usize| [1, 2, 3].map(|layer| Some(LoraConfig::new(rank + layer, 2.0)));
    for (name, rank) in [("a", 1), ("b", 4), ("c", 8)] {
        model.insert_adapter(name, trained(cpu, config(rank), rank as u64))?;
    }
    for step in 0..ROUND {
        let rows = [Some("a"), None, Some("b"), Some("c"), Some("a")];
        let x: Vec<E> = (0..rows.len() * SIZES[0]).map(|_| E::from_f32(rng.gaussian() as f32)).collect();
        let x = Tensor::from_slice(cpu, (rows.len(), SIZES[0]), &x)?;
        match step % 10 {
            7 => {
                model.merge_as(cpu, &["b", "a"], Merge::default())?;
                hash_bits(&mut hasher, &model.predict(cpu, x)?);
                model.unmerge_adapters(cpu)?;
            }
            8 => {
                model.swap_adapter(cpu, "c", trained(cpu, config(8), step as u64))?;
                hash_bits(&mut hasher, &model.predict_mixed(cpu, &x, &rows)?);
            }
            _ => hash_bits(&mut hasher, &model.predict_mixed(cpu, &x, &rows)?),
        }
    }
    model.unload()?;
    base_bits(cpu, model).hash(&mut hasher);
    Ok(hasher.finish())
}

/// A new adapter is trained and deleted.
fn train<E: Float>(cpu: &Cpu<E>, model: &mut Mlp<Cpu<E>>) -> Result<u64> {
    let (mut hasher, mut rng, rows) = (DefaultHasher::new(), Rng::new(2), 8);
    let config = LoraConfig { dropout: 0.1, use_dora: true, ..LoraConfig::new(4, 8.0) };
    model.add_adapter(cpu, "a", Targets::All, &config, &mut rng)?;
    let (mut adam, mut gradients, mut loss) = (Adam::new(1e-3)?, Gradients::default(), [0.0]);
    for step in 0..ROUND {
        let x: Vec<E> = (0..rows * SIZES[0]).map(|_| E::from_f32(rng.gaussian() as f32)).collect();
        let labels: Vec<u32> = (0..rows).map(|_| rng.below(SIZES[3]) as u32).collect();
        let mut tape = Tape::reusing(cpu, gradients);
        let x = tape.input(Tensor::from_slice(cpu, (rows, SIZES[0]), &x)?);
        let logits = model.forward(&mut tape, x, Some(step as u64))?;
        tape.cross_entropy(logits, &Labels::new(cpu, SIZES[3], &labels)?)?.copy_to_slice(cpu, &mut loss)?;
        hash_bits(&mut hasher, &loss);
        gradients = tape.backward()?;
        adam.step(cpu, model.params_mut(), &gradients)?;
    }
    model.delete_adapter("a")?;
    base_bits(cpu, model).hash(&mut hasher);
    Ok(hasher.finish())
}

/// Asserts that every round has the result of the first, and that memory does not grow after the first tenth of the steps.
fn soak<E: Float>(what: &str, steps: usize, round: fn(&Cpu<E>, &mut Mlp<Cpu<E>>) -> Result<u64>) {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _alone = ONE_AT_A_TIME.lock();
    const SLACK: usize = 1 << 10;
    let (cpu, start) = (cpu::<E>(), Instant::now());
    let (mut model, rounds) = (net(&cpu), steps / ROUND);
    let (mut first, mut before) = (None, 0);
    for at in 0..rounds {
        if at == rounds.div_ceil(10) {
            before = resident();
        }
        let result = round(&cpu, &mut model).unwrap();
        assert_eq!(*first.get_or_insert(result), result, "{what}: round {at} has other bits than the first");
    }
    let after = resident();
    println!("{what}, {}: {steps} steps in {:.1?}, {before} KiB became {after}", E::DTYPE, start.elapsed());
    assert!(after <= before + SLACK, "{what}: memory grew from {before} to {after} KiB in {steps} steps");
}

#[test]
fn memory_is_flat_and_bits_are_equal() {
    soak::<f32>("decoding", 2_000, decode);
    soak::<bf16>("decoding", 2_000, decode);
    soak::<f32>("training", 300, train);
    soak::<bf16>("training", 300, train);
}

#[test]
#[ignore = "takes minutes"]
fn memory_is_flat_and_bits_are_equal_for_long() {
    soak::<f32>("decoding", 1_000_000, decode);
    soak::<bf16>("decoding", 1_000_000, decode);
    soak::<f32>("training", 10_000, train);
    soak::<bf16>("training", 10_000, train);
}
