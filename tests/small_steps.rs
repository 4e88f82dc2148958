//! Small optimizer steps on 16-bit backends are not lost: adapters learn as on the same weights in f32. A parameter that the
//! caller overwrites is the start of the next step.

mod support;

use std::collections::HashMap;

use lowrank::autograd::{Gradients, Tape};
use lowrank::nn::{Adam, Adaptable, Adapter, DEFAULT, LayerAdapter, Linear, LoraConfig, Mlp, Targets};
use lowrank::op::{self, AdamRate, Labels};
use lowrank::random::Rng;
use lowrank::{Backend, Cpu, Float, Tensor, bf16, f16};
use support::data::{down, up};
use support::oracle::Mat;

const SIZES: [usize; 4] = [64, 128, 128, 10];
const BATCH: usize = 32;
const LR: f32 = 1e-4;

fn mat<B: Backend, T: Float>(backend: &B, tensor: &Tensor<B, T>) -> Mat {
    let numbers = down(backend, tensor).into_iter().map(|x| f64::from(x.to_f32()));
    Mat::from_vec(tensor.rows(), tensor.cols(), numbers.collect())
}

/// Sixteen batches of elements that `E` holds exactly; the label of a row is the index of the largest of its first ten elements.
fn batches<E: Float>(seed: u64) -> Vec<(Mat, Vec<u32>)> {
    let mut rng = Rng::new(seed + 6);
    let mut batch = || {
        let number = |rng: &mut Rng| f64::from(E::from_f32(rng.gaussian() as f32).to_f32());
        let x = Mat::from_vec(BATCH, SIZES[0], (0..BATCH * SIZES[0]).map(|_| number(&mut rng)).collect());
        let largest = |i: usize| (0..10).max_by(|&p, &q| x.at(i, p).total_cmp(&x.at(i, q))).unwrap();
        let labels = (0..BATCH).map(|i| largest(i) as u32).collect();
        (x, labels)
    };
    (0..16).map(|_| batch()).collect()
}

fn gradients<B: Backend>(backend: &B, model: &Mlp<B>, (x, labels): &(Mat, Vec<u32>)) -> Gradients<B> {
    let mut tape = Tape::new(backend);
    let x = tape.input(up(backend, x));
    let logits = model.forward(&mut tape, x, None).unwrap();
    tape.cross_entropy(logits, &Labels::new(backend, SIZES[3], labels).unwrap()).unwrap();
    tape.backward().unwrap()
}

/// A base with fresh adapters of rank 8 on every layer.
fn model<B: Backend>(backend: &B, seed: u64) -> Mlp<B> {
    let mut rng = Rng::new(seed);
    let mut model = Mlp::new(backend, &SIZES, &mut rng).unwrap();
    model.add_adapters(backend, Targets::All, &LoraConfig::new(8, 16.0), &mut rng).unwrap();
    model
}

/// The same model in f32.
fn widened<B: Backend>(backend: &B, model: &Mlp<B>, wide: &Cpu<f32>) -> Mlp<Cpu<f32>> {
    let wider = |tensor: &Tensor<B>| up(wide, &mat(backend, tensor));
    let base = model.layers().map(|(_, layer)| {
        let base = layer.base();
        Linear::from_tensors(wider(base.weight().tensor()), base.bias().map(|bias| wider(bias.tensor()))).unwrap()
    });
    let adapters = model.adapters(DEFAULT).map(|(layer, adapter)| {
        let (a, b) = (wider(adapter.a().tensor()), wider(adapter.b().tensor()));
        (layer.to_owned(), Adapter::from_tensors(a, b, LoraConfig::new(8, 16.0)).unwrap())
    });
    let mut model = Mlp::from_layers(base.collect()).unwrap();
    model.set_adapters(adapters.collect()).unwrap();
    model
}

/// `B·A` of every layer after two hundred steps.
fn updates<B: Backend>(
    backend: &B,
    mut model: Mlp<B>,
    batches: &[(Mat, Vec<u32>)],
    mut step: impl FnMut(&mut Mlp<B>, &Gradients<B>),
) -> Vec<Mat> {
    for batch in batches.iter().cycle().take(200) {
        let gradients = gradients(backend, &model, batch);
        assert_eq!(gradients.len(), 6, "A and B of three layers");
        step(&mut model, &gradients);
    }
    let factors =
        model.adapters(DEFAULT).map(|(_, adapter)| [adapter.b(), adapter.a()].map(|param| mat(backend, param.tensor())));
    factors.map(|[b, a]| &b * &a).collect()
}

/// Adam without masters: steps are applied to the stored parameters.
fn without_masters<B: Backend>(backend: &B) -> impl FnMut(&mut Mlp<B>, &Gradients<B>) {
    let (mut moments, mut t) = (HashMap::new(), 0);
    move |model, gradients| {
        t += 1;
        for param in model.params_mut() {
            let Some(grad) = gradients.get(param) else { continue };
            let zeros = || Tensor::<B, f32>::zeros(backend, param.tensor().shape()).unwrap();
            let (m, v) = moments.entry(param.id()).or_insert_with(|| (zeros(), zeros()));
            let (mut w, rate) = (param.tensor().try_clone(backend).unwrap(), AdamRate::new(LR, 0.9, 0.999, 1e-8, t).unwrap());
            op::Adam { grad, rate, m, v, master: None, w: &mut w }.run(backend).unwrap();
            param.set_tensor(w).unwrap();
        }
    }
}

/// `‖got - want‖ / ‖want‖` over the `B·A` of all layers of the adapter.
fn difference(got: &[Mat], want: &[Mat]) -> f64 {
    let norm = |layers: &mut dyn Iterator<Item = Mat>| layers.map(|layer| layer.norm().powi(2)).sum::<f64>().sqrt();
    let apart = |(got, want): (&Mat, &Mat)| got + &(want * -1.0);
    norm(&mut got.iter().zip(want).map(apart)) / norm(&mut want.iter().cloned())
}

/// The relative difference between an adapter and the one in f32: as a whole, and layer by layer.
#[derive(Debug)]
struct Off {
    whole: f64,
    layers: Vec<f64>,
}

/// The relative difference to f32 of the updates after two hundred steps: with masters, and without.
fn off_from_f32<E: Float>(seed: u64) -> [Off; 2] {
    let (backend, wide, batches) = (Cpu::<E>::new().unwrap(), Cpu::<f32>::new().unwrap(), batches::<E>(seed));
    let fresh = || model(&backend, seed);
    let mut adam = Adam::new(LR).unwrap();
    let want = updates(&wide, widened(&backend, &fresh(), &wide), &batches, |model, gradients| {
        adam.step(&wide, model.params_mut(), gradients).unwrap();
    });
    let mut adam = Adam::new(LR).unwrap();
    let with = updates(&backend, fresh(), &batches, |model, gradients| {
        adam.step(&backend, model.params_mut(), gradients).unwrap();
    });
    let without = updates(&backend, fresh(), &batches, without_masters(&backend));
    let layers = |got: &[Mat]| (0..want.len()).map(|i| difference(&got[i..=i], &want[i..=i])).collect();
    let off = [with, without].map(|got| Off { whole: difference(&got, &want), layers: layers(&got) });
    println!("{}, seed {seed}: with masters {:.4?}, without {:.4?}", E::DTYPE, off[0], off[1]);
    off
}

#[test]
fn adapters_over_bf16_move_as_over_f32() {
    let seeds = [5, 1, 2, 3, 4];
    let offs = seeds.map(off_from_f32::<bf16>);
    for [with, without] in &offs {
        assert!(with.whole <= 0.02, "{with:?}");
        assert!(without.layers.iter().all(|&off| off > 0.02), "{without:?}: so this shows something");
    }
    // A single layer of one seed may be further off (2.2 % with seed 5); PEFT's layers vary as much from seed to seed.
    for layer in 0..3 {
        let mean = offs.iter().map(|[with, _]| with.layers[layer]).sum::<f64>() / seeds.len() as f64;
        assert!(mean <= 0.02, "layer {layer}: {mean}");
    }
}

#[test]
fn adapters_over_f16_move_as_over_f32() {
    let [with, without] = off_from_f32::<f16>(5);
    assert!(with.layers.iter().all(|&off| off <= 0.02), "{with:?}, without masters {without:?}");
}

/// After each way of overwriting a parameter between two steps, the next step starts from the written elements.
#[test]
fn an_overwritten_parameter_is_where_the_next_step_starts() {
    let (cpu, batches) = (Cpu::<bf16>::new().unwrap(), batches::<bf16>(5));
    let written = |rows: usize, cols: usize| -> Vec<bf16> {
        (0..rows * cols).map(|e| bf16::from_f32((e % 17) as f32 / 16.0 - 0.5)).collect()
    };
    type Write = fn(&Cpu<bf16>, &mut Mlp<Cpu<bf16>>, &dyn Fn(usize, usize) -> Vec<bf16>);
    let ways: [(&str, Write); 3] = [
        ("set_tensor", |cpu, model, numbers| {
            for param in model.params_mut().filter(|param| param.trainable) {
                let shape = param.tensor().shape();
                param.set_tensor(Tensor::from_slice(cpu, shape, &numbers(shape.rows, shape.cols)).unwrap()).unwrap();
            }
        }),
        ("copy_from_slice", |cpu, model, numbers| {
            for param in model.params_mut().filter(|param| param.trainable) {
                let shape = param.tensor().shape();
                param.copy_from_slice(cpu, &numbers(shape.rows, shape.cols)).unwrap();
            }
        }),
        ("swap_adapter", |cpu, model, numbers| {
            let shapes: Vec<_> = model
                .adapters(DEFAULT)
                .map(|(layer, there)| (layer.to_owned(), [there.a(), there.b()].map(|param| param.tensor().shape())))
                .collect();
            let parts = shapes.into_iter().map(|(layer, shapes)| {
                let [a, b] = shapes.map(|shape| Tensor::from_slice(cpu, shape, &numbers(shape.rows, shape.cols)).unwrap());
                (layer, LayerAdapter::Lora(Adapter::from_tensors(a, b, LoraConfig::new(8, 16.0)).unwrap()))
            });
            model.swap_adapter(cpu, DEFAULT, parts.collect()).unwrap();
        }),
    ];
    for (name, write) in ways {
        let (mut model, mut adam) = (model(&cpu, 5), Adam::new(LR).unwrap());
        let mut step = |model: &mut Mlp<_>, batch| {
            let gradients = gradients(&cpu, model, batch);
            adam.step(&cpu, model.params_mut(), &gradients).unwrap();
        };
        batches.iter().for_each(|batch| step(&mut model, batch));
        write(&cpu, &mut model, &written);
        step(&mut model, &batches[0]);
        for param in model.params_mut().filter(|param| param.trainable) {
            let (rows, cols) = (param.tensor().rows(), param.tensor().cols());
            for (got, want) in down(&cpu, param.tensor()).into_iter().zip(written(rows, cols)) {
                let [got, want] = [got, want].map(f64::from);
                // One step of at most some ten learning rates, and half a unit in the last place.
                let bound = 10.0 * f64::from(LR) + want.abs() / 256.0;
                assert!((got - want).abs() <= bound, "{name}: {got}, written was {want}");
            }
        }
    }
}
