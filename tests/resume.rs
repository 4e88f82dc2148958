//! Checkpoints of training: a resumed run has the bits of one that was not interrupted; what is damaged or of another run is
//! refused, and changes nothing.

mod support;

use std::fs;
use std::path::Path;

use lowrank::autograd::Tape;
use lowrank::distributed::Sampler;
use lowrank::nn::{Adam, Adaptable, DEFAULT, LoraConfig, Mlp, Targets};
use lowrank::op::Labels;
use lowrank::random::Rng;
use lowrank::training::{Progress, resume, resume_from_bytes, save};
use lowrank::{Backend, Error, Float, Result, Tensor, bf16};
use safetensors::tensor::{Dtype, TensorView, serialize};
use support::adapters::cpu;

on_every_backend!(a_resumed_run_has_the_bits_of_an_uninterrupted_one);

const SIZES: [usize; 3] = [6, 8, 5];
const SETTINGS: &str = "batch 5, seed 4";

/// A run of training: everything that a step changes.
struct Run<B: Backend> {
    model: Mlp<B>,
    adam: Adam<B>,
    sampler: Sampler,
    rng: Rng,
    steps: u64,
}

impl<B: Backend> Run<B> {
    /// `base`: train the network itself, without an adapter.
    fn new(backend: &B, base: bool) -> Self {
        let mut rng = Rng::new(4);
        let mut model = Mlp::new(backend, &SIZES, &mut rng).unwrap();
        if !base {
            let config = LoraConfig { dropout: 0.2, use_dora: true, ..LoraConfig::new(2, 4.0) };
            model.add_adapters(backend, Targets::All, &config, &mut rng).unwrap();
        }
        let mut adam = Adam::adamw(1e-2, 0.1).unwrap();
        (adam.loraplus_lr_ratio, adam.beta1) = (4.0, 0.85);
        Self { model, adam, sampler: Sampler::new(17, 5, 4).unwrap(), rng, steps: 0 }
    }

    fn step(&mut self, backend: &B) -> Result<f32> {
        let batch = self.sampler.next_batch();
        let mut noise = Rng::new(99);
        let all: Vec<B::Elem> = (0..17 * SIZES[0]).map(|_| B::Elem::from_f32(noise.gaussian() as f32)).collect();
        let rows: Vec<B::Elem> = batch.iter().flat_map(|&i| all[i * SIZES[0]..][..SIZES[0]].to_vec()).collect();
        let labels: Vec<u32> = batch.iter().map(|&i| (i % SIZES[2]) as u32).collect();
        let mut tape = Tape::new(backend);
        let x = tape.input(Tensor::from_slice(backend, (batch.len(), SIZES[0]), &rows)?);
        let logits = self.model.forward(&mut tape, x, Some(u64::from(self.rng.word())))?; // a dropout mask from the generator
        let loss = tape.cross_entropy(logits, &Labels::new(backend, SIZES[2], &labels)?)?.to_vec(backend)?[0];
        let gradients = tape.backward()?;
        self.adam.step(backend, self.model.params_mut(), &gradients)?;
        self.steps += 1;
        Ok(loss)
    }

    fn progress(&self) -> Progress {
        let (position, rng) = (self.sampler.position(), self.rng.clone());
        Progress { step: self.steps, position, rng, settings: SETTINGS.into(), extra: "losses: 1, 2".into() }
    }

    fn save(&mut self, backend: &B, path: &Path) -> Result<()> {
        let progress = self.progress();
        save(path, backend, &mut self.model, &self.adam, &progress)
    }

    fn resume(&mut self, backend: &B, path: &Path) -> Result<()> {
        let progress = resume(path, backend, &mut self.model, &mut self.adam, SETTINGS)?;
        assert_eq!((progress.extra.as_str(), progress.settings.as_str()), ("losses: 1, 2", SETTINGS));
        self.sampler.seek(progress.position)?;
        (self.steps, self.rng) = (progress.step, progress.rng);
        Ok(())
    }

    /// The bits of everything that is trained.
    fn bits(&mut self, backend: &B) -> Vec<u32> {
        let host = |param: &mut lowrank::autograd::Param<B>| param.tensor().to_vec(backend).unwrap();
        self.model.params_mut().flat_map(host).map(|x| x.to_f32().to_bits()).collect()
    }
}

fn a_resumed_run_has_the_bits_of_an_uninterrupted_one<B: Backend>(backend: &B) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("training.safetensors");
    for base in [false, true] {
        let mut whole = Run::new(backend, base);
        let losses: Vec<f32> = (0..9).map(|_| whole.step(backend).unwrap()).collect();
        for interrupted in [0, 1, 5] {
            let mut first = Run::new(backend, base);
            for _ in 0..interrupted {
                first.step(backend).unwrap();
            }
            first.save(backend, &path).unwrap();
            drop(first);
            let mut second = Run::new(backend, base);
            second.adam.lr = 0.5; // the file has the one of the run
            second.step(backend).unwrap(); // and a state of its own, which goes
            second.resume(backend, &path).unwrap();
            let rest: Vec<f32> = (interrupted..9).map(|_| second.step(backend).unwrap()).collect();
            assert_eq!(rest, losses[interrupted..], "interrupted after {interrupted} steps");
            assert!(second.bits(backend) == whole.bits(backend), "interrupted after {interrupted} steps");
            assert_eq!((second.steps, second.adam.steps()), (9, 9));
        }
    }
}

/// Over 16 bits the masters are part of the state: without them the steps that follow would differ.
#[test]
fn masters_of_16_bit_parameters_are_saved() {
    let (backend, folder) = (&cpu::<bf16>(), tempfile::tempdir().unwrap());
    let path = folder.path().join("training.safetensors");
    let mut whole = Run::new(backend, false);
    for _ in 0..3 {
        whole.step(backend).unwrap();
    }
    whole.save(backend, &path).unwrap();
    let mut second = Run::new(backend, false);
    second.resume(backend, &path).unwrap();
    for _ in 0..6 {
        assert_eq!(whole.step(backend).unwrap().to_bits(), second.step(backend).unwrap().to_bits());
    }
    assert_eq!(whole.bits(backend), second.bits(backend));
}

#[test]
fn an_interrupted_write_leaves_the_file_before_it() {
    let (backend, folder) = (&cpu::<f32>(), tempfile::tempdir().unwrap());
    let path = folder.path().join("training.safetensors");
    let mut run = Run::new(backend, false);
    run.save(backend, &path).unwrap();
    let before = fs::read(&path).unwrap();
    run.step(backend).unwrap();
    run.model.merge_adapters(backend).unwrap();
    assert!(matches!(run.save(backend, &path), Err(Error::Value { .. })), "a merged adapter is not trained");
    assert_eq!(fs::read(&path).unwrap(), before);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    assert!(run.save(backend, &folder.path().join("missing/training.safetensors")).is_err());
}

/// Every refusal leaves model and optimizer as they were.
fn assert_refused(run: &mut Run<lowrank::Cpu<f32>>, bytes: &[u8], settings: &str, want: &str) {
    let backend = &cpu::<f32>();
    let (before, steps, lr) = (run.bits(backend), run.adam.steps(), run.adam.lr);
    let path = Path::new("training.safetensors");
    let error = resume_from_bytes(bytes, path, backend, &mut run.model, &mut run.adam, settings).unwrap_err();
    assert!(matches!(error, Error::File { .. }) && error.to_string().contains(want), "{error}; want: {want}");
    assert_eq!((run.bits(backend), run.adam.steps(), run.adam.lr), (before, steps, lr), "{want}");
}

#[test]
fn files_of_other_runs_and_damaged_ones_are_refused() {
    let (backend, folder) = (&cpu::<f32>(), tempfile::tempdir().unwrap());
    let path = folder.path().join("training.safetensors");
    let mut run = Run::new(backend, false);
    run.step(backend).unwrap();
    run.save(backend, &path).unwrap();
    let bytes = fs::read(&path).unwrap();
    let mut other = Run::new(backend, false);
    assert_refused(
        &mut other,
        &bytes,
        "batch 6, seed 4",
        "other settings: `batch 5, seed 4`, and this run has `batch 6, seed 4`",
    );
    assert_refused(&mut other, &[], SETTINGS, "truncated");
    assert_refused(&mut other, &bytes[..bytes.len() - 3], SETTINGS, "truncated");
    assert_refused(&mut Run::new(backend, true), &bytes, SETTINGS, "has no `param.linear1.weight`, which this model trains");
    let mut base = Run::new(backend, true);
    base.save(backend, &path).unwrap();
    assert_refused(&mut other, &fs::read(&path).unwrap(), SETTINGS, "has no `param.linear1.default.lora_A`");

    let mut wider = Run::new(backend, false);
    wider.model.add_adapters(backend, Targets::All, &LoraConfig::new(3, 4.0), &mut Rng::new(0)).unwrap();
    assert_refused(&mut wider, &bytes, SETTINGS, "`param.linear1.default.lora_A` is 2×6 F32, and this model has 3×6 f32");
    let mut fewer = Run::new(backend, false);
    let config = LoraConfig { use_dora: true, ..LoraConfig::new(2, 4.0) };
    fewer.model.add_adapters(backend, Targets::Names(&["linear1"]), &config, &mut Rng::new(0)).unwrap();
    assert_refused(&mut fewer, &bytes, SETTINGS, "`linear2.default.lora_A`, which this model does not train");

    let zeros = TensorView::new(Dtype::F32, vec![1], &[0; 4]).unwrap();
    let foreign = serialize([("x", zeros)], None).unwrap();
    assert_refused(&mut other, &foreign, SETTINGS, "no checkpoint of training");
    assert!(fewer.model.adapters(DEFAULT).count() == 1);
}

/// Any byte of the file that changes is noticed: nothing is read from a damaged file.
#[test]
fn every_changed_byte_is_noticed() {
    let (backend, folder) = (&cpu::<f32>(), tempfile::tempdir().unwrap());
    let path = folder.path().join("training.safetensors");
    let mut run = Run::new(backend, false);
    run.step(backend).unwrap();
    run.save(backend, &path).unwrap();
    let bytes = fs::read(&path).unwrap();
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 1 << (at % 8);
        let (mut model, mut adam) = (Run::new(backend, false).model, Adam::new(1e-2).unwrap());
        let read = resume_from_bytes(&damaged, &path, backend, &mut model, &mut adam, SETTINGS);
        assert!(matches!(read, Err(Error::File { .. })), "byte {at} of {}", bytes.len());
    }
}
