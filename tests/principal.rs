//! Adapters that are initialised with a part of the weights: outputs do not change, and unmerging restores every bit.

mod support;

use std::fs;
use std::path::{Path, PathBuf};

use lowrank::adapter::{self, CombinationType, Combine, Folder, Principal, combine, init_from_weight};
use lowrank::nn::{Adaptable, DEFAULT, LoraConfig, Mlp, Targets};
use lowrank::random::Rng;
use lowrank::{Backend, Error, bf16, f16};
use support::adapters::{SIZES, base_bits, cpu, document, net, outputs};
use support::bounds::relative_error;
use support::cases::{self, Case, Mats, TOLERANCE, Task};
use support::oracle::Mat;

on_every_backend!(
    outputs_do_not_change_and_the_weights_are_restored,
    a_trained_adapter_is_saved_as_a_plain_one,
    the_folders_of_peft_give_its_outputs,
);

fn near(got: &[f32], want: &[f32]) -> bool {
    let want = Mat::from_vec(5, SIZES[3], want.iter().map(|&y| y.into()).collect());
    relative_error(got, &want) <= TOLERANCE
}

fn begun<B: Backend>(backend: &B, part: Principal) -> Mlp<B> {
    let mut model = net(backend);
    model.add_adapters(backend, Targets::All, &LoraConfig::new(3, 4.5), &mut Rng::new(1)).unwrap();
    init_from_weight(backend, &mut model, DEFAULT, "start", part).unwrap();
    model
}

fn outputs_do_not_change_and_the_weights_are_restored<B: Backend<Elem = f32>>(backend: &B) {
    let (base, bits) = (outputs(backend, &net(backend)), base_bits(backend, &net(backend)));
    for part in [Principal::Pissa, Principal::Olora] {
        let mut model = begun(backend, part);
        assert!(near(&outputs(backend, &model), &base), "{part:?}");
        let (_, layer) = model.layers().next().unwrap();
        let (w, was) = (layer.base().weight().tensor().to_vec(backend).unwrap(), net(backend));
        let was = was.layers().next().unwrap().1.base().weight().tensor().to_vec(backend).unwrap();
        let square = |w: &[f32]| w.iter().map(|&w| f64::from(w).powi(2)).sum::<f64>();
        assert!(square(&w) < 0.9 * square(&was), "{part:?}: the principal part is out of the weight");
        assert!(layer.adapter(DEFAULT).unwrap().a().trainable && !layer.adapter("start").unwrap().a().trainable);
        model.unmerge_adapters(backend).unwrap();
        assert_eq!(base_bits(backend, &model), bits, "{part:?}");
    }
}

/// An adapter with changed factors is saved as a plain adapter of twice the rank, which a model with the original weights loads.
fn a_trained_adapter_is_saved_as_a_plain_one<B: Backend<Elem = f32>>(backend: &B) {
    for part in [Principal::Pissa, Principal::Olora] {
        let mut model = begun(backend, part);
        for param in model.params_mut().filter(|param| param.trainable) {
            let moved: Vec<f32> = param.tensor().to_vec(backend).unwrap().into_iter().map(|x| 1.1 * x + 0.01).collect();
            param.copy_from_slice(backend, &moved).unwrap();
        }
        let dir = tempfile::tempdir().unwrap();
        adapter::save(backend, &model, dir.path()).unwrap();
        let (learned, start) = (Folder::read(dir.path()).unwrap(), Folder::read(&dir.path().join("start")).unwrap());
        let plain = combine(&[(&learned, 1.0), (&start, 1.0)], &Combine::new(CombinationType::Cat)).unwrap();
        plain.write(&dir.path().join("plain")).unwrap();

        let mut fresh = net(backend);
        adapter::load(backend, &mut fresh, &dir.path().join("plain")).unwrap();
        assert_eq!(fresh.layer("linear1").unwrap().adapter(DEFAULT).unwrap().config().rank, 6);
        assert!(near(&outputs(backend, &fresh), &outputs(backend, &model)), "{part:?}");
    }
}

#[test]
fn weights_without_a_principal_part_are_refused_and_nothing_changes() {
    let cpu = cpu::<f32>();
    for config in [LoraConfig::new(8, 1.0), LoraConfig { use_dora: true, ..LoraConfig::new(2, 1.0) }, LoraConfig::new(2, -1.0)] {
        let mut model = net(&cpu);
        model.add_adapters(&cpu, Targets::All, &config, &mut Rng::new(1)).unwrap();
        let (bits, before) = (base_bits(&cpu, &model), outputs(&cpu, &model));
        assert!(matches!(init_from_weight(&cpu, &mut model, DEFAULT, "start", Principal::Pissa), Err(Error::Value { .. })));
        assert!(init_from_weight(&cpu, &mut model, "other", "start", Principal::Pissa).is_err());
        assert!(init_from_weight(&cpu, &mut model, DEFAULT, DEFAULT, Principal::Pissa).is_err());
        assert_eq!((base_bits(&cpu, &model), outputs(&cpu, &model)), (bits, before));
        assert_eq!(model.adapter_names(), [DEFAULT]);
    }
}

/// Adapters that PEFT initialised this way, trained and saved: the cases, their folders, and the weights of the network.
fn of_peft() -> Vec<(Case, PathBuf, Mats)> {
    let cases = cases::read_all(&Path::new(env!("CARGO_MANIFEST_DIR")).join("principal")).unwrap();
    let parts = |case: Case| match case.task.clone() {
        Task::Peft { folder, inputs } => (case, folder, inputs),
        other => panic!("{other:?}"),
    };
    cases.into_iter().map(parts).collect()
}

/// Enabled, disabled, merged and unmerged; every bit of the weights is restored.
fn the_folders_of_peft_give_its_outputs<B: Backend<Elem = f32>>(backend: &B) {
    for (case, folder, _) in of_peft() {
        let failures = case.failures(&case.run(backend).unwrap());
        assert!(failures.is_empty(), "{failures:?}");
        comes_and_goes(backend, &folder);
    }
}

#[test]
fn every_bit_comes_back_in_16_bits() {
    for (_, folder, _) in of_peft() {
        comes_and_goes(&cpu::<f16>(), &folder);
        comes_and_goes(&cpu::<bf16>(), &folder);
    }
}

fn comes_and_goes<B: Backend>(backend: &B, folder: &Path) {
    let mut model = net(backend);
    let (bits, plain) = (base_bits(backend, &model), outputs(backend, &model));
    model.add_adapter(backend, "other", Targets::All, &LoraConfig::new(2, 2.0), &mut Rng::new(1)).unwrap();
    adapter::load_as(backend, &mut model, "learned", folder).unwrap();
    model.set_active(&["other", "learned"]).unwrap();
    model.merge_adapters(backend).unwrap();
    assert_ne!(base_bits(backend, &model), bits);
    model.unmerge_adapter(backend, "learned").unwrap();
    model.unmerge_adapters(backend).unwrap();
    model.delete_adapter("learned").unwrap();
    assert_eq!(base_bits(backend, &model), bits, "{}", folder.display());
    model.unload().unwrap();
    assert_eq!((base_bits(backend, &model), outputs(backend, &model)), (bits, plain), "{}", folder.display());
}

/// Saved again, it is a plain adapter of twice the rank. scripts/check-adapter-in-peft.py checks that PEFT computes the same with
/// both folders.
#[test]
fn a_folder_of_peft_is_saved_as_a_plain_one() {
    let cpu = cpu::<f32>();
    for (case, folder, inputs) in of_peft() {
        let mut model = cases::base_net(&cpu, &inputs).unwrap();
        let config = adapter::load(&cpu, &mut model, &folder).unwrap();
        assert!(config.principal().is_some());
        let plain = Path::new(env!("CARGO_TARGET_TMPDIR")).join("for_peft").join(&case.name);
        adapter::save_with(&cpu, &model, &config, &plain).unwrap();
        fs::copy(folder.join("expected.safetensors"), plain.join("expected.safetensors")).unwrap();
        let (was, is) = (document(&folder), document(&plain));
        assert_eq!((&is["init_lora_weights"], &is["r"]), (&true.into(), &(2 * was["r"].as_u64().unwrap()).into()));

        let mut again = cases::base_net(&cpu, &inputs).unwrap();
        assert_eq!(adapter::load(&cpu, &mut again, &plain).unwrap().principal(), None);
        assert_eq!(outputs(&cpu, &again), outputs(&cpu, &model), "{}", case.name);
    }
}

#[test]
fn a_random_initialisation_from_the_weights_is_refused_by_name() {
    let cpu = cpu::<f32>();
    let dir = tempfile::tempdir().unwrap();
    let mut model = net(&cpu);
    model.add_adapters(&cpu, Targets::All, &LoraConfig::new(8, 1.0), &mut Rng::new(1)).unwrap(); // above a side: 7
    adapter::save(&cpu, &model, dir.path()).unwrap();
    let mut settings = document(dir.path());
    settings["init_lora_weights"] = "pissa".into();
    fs::write(dir.path().join(adapter::CONFIG_FILE), serde_json::to_vec(&settings).unwrap()).unwrap();
    let (mut other, plain) = (net(&cpu), outputs(&cpu, &net(&cpu)));
    let error = adapter::load(&cpu, &mut other, dir.path()).unwrap_err();
    assert!(matches!(error, Error::Value { name: "rank", .. }) && error.to_string().contains("in `linear3`"), "{error}");
    assert_eq!(outputs(&cpu, &other), plain);
}
