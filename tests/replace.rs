//! What takes the place of something else in a live model: a parameter, its numbers, an adapter.

mod support;

use lowrank::autograd::Param;
use lowrank::nn::{DEFAULT, Linear, LoraConfig, Tuned};
use lowrank::{Backend, Error, Tensor, adapter};
use support::adapters::{adapted, base_bits, cpu, net, outputs, trained};

on_every_backend!(a_parameter_keeps_its_shape);

fn all(config: &LoraConfig) -> [Option<LoraConfig>; 3] {
    [Some(config.clone()), Some(config.clone()), Some(config.clone())]
}

fn a_parameter_keeps_its_shape<B: Backend<Elem = f32>>(backend: &B) {
    let mut param = Param::new(Tensor::from_slice(backend, (2, 3), &[1.0; 6]).unwrap());
    let id = param.id();
    let error = param.set_tensor(Tensor::zeros(backend, (3, 2)).unwrap()).unwrap_err();
    assert_eq!(error.to_string(), "set_tensor: `tensor` is 3×2, want 2×3");
    assert!(matches!(param.copy_from_slice(backend, &[2.0; 5]), Err(Error::Value { name: "host", .. })));
    assert_eq!(param.tensor().to_vec(backend).unwrap(), [1.0; 6]);
    param.set_tensor(Tensor::from_slice(backend, (2, 3), &[3.0; 6]).unwrap()).unwrap();
    assert_eq!(param.tensor().to_vec(backend).unwrap(), [3.0; 6]);
    param.copy_from_slice(backend, &[4.0; 6]).unwrap();
    assert_eq!((param.tensor().to_vec(backend).unwrap(), param.id()), (vec![4.0; 6], id));
}

fn without_layer(error: Error) -> Error {
    match error {
        Error::InLayer { error, .. } => *error,
        other => other,
    }
}

/// Who holds a parameter can still put another one in its place: an error that names it, wherever it is used.
#[test]
fn a_parameter_of_another_shape_in_the_place_of_one_is_named() {
    let (cpu, folder) = (cpu::<f32>(), tempfile::tempdir().unwrap());
    let dora = LoraConfig { use_dora: true, ..LoraConfig::new(2, 4.0) };
    for (at, name) in [(0, "a"), (1, "b"), (2, "magnitude")] {
        for shape in [(0, 0), (1, 1)] {
            let mut model = adapted(&cpu, all(&dora));
            let bits = base_bits(&cpu, &model);
            let there = model.params_mut().filter(|param| param.trainable).nth(at).unwrap();
            *there = Param::new(Tensor::zeros(&cpu, shape).unwrap());
            let refused = [
                without_layer(model.merge_adapters(&cpu).unwrap_err()),
                model.swap_adapter(&cpu, DEFAULT, trained(&cpu, all(&dora), 3)).unwrap_err(),
                adapter::save(&cpu, &model, folder.path()).unwrap_err(),
                adapter::save_as(&cpu, &model, DEFAULT, folder.path()).unwrap_err(),
            ];
            for error in refused {
                assert!(matches!(error, Error::Shape { name: named, .. } if named == name), "{name}: {error}");
            }
            assert!(name == "magnitude" || model.reserve_rank(&cpu, DEFAULT, 9).is_err());
            assert_eq!(base_bits(&cpu, &model), bits);
        }
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "something was written");
}

/// Whole layers, one with a bias and one without, are not swapped for one another.
#[test]
fn a_swap_that_would_leave_a_bias_behind_is_refused() {
    let cpu = cpu::<f32>();
    let config = LoraConfig { modules_to_save: vec!["linear3".into()], ..LoraConfig::new(2, 4.0) };
    let mut model = net(&cpu);
    model.insert_adapter("a", trained(&cpu, all(&config), 4)).unwrap();
    let (before, mut parts) = (outputs(&cpu, &model), trained(&cpu, all(&config), 5));
    let without_bias = Linear::from_tensors(Tensor::zeros(&cpu, (7, 9)).unwrap(), None).unwrap();
    parts[2].1 = Tuned::Whole(without_bias);
    assert!(matches!(model.swap_adapter(&cpu, "a", parts), Err(Error::Value { name: "bias", .. })));
    assert_eq!(outputs(&cpu, &model), before);
}
