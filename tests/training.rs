//! Training adapters: gradients of all their parameters, two learning rates, gradient accumulation, clipping.

mod support;

use lowrank::autograd::{Gradients, Tape};
use lowrank::nn::{Adam, Adaptable, Adapter, Bias, DEFAULT, Init, Linear, LoraConfig, Merge, Mlp, Targets};
use lowrank::op::{Dropout, Labels, WeightGrad};
use lowrank::random::Rng;
use lowrank::{Backend, Error, Tensor};
use support::bounds::relative_error;
use support::data::{down, mask, up};
use support::oracle::Mat;

on_every_backend!(
    every_part_of_an_adapter_gets_its_gradient,
    lora_plus_gives_b_and_biases_a_larger_learning_rate,
    weight_decay_holds_for_every_parameter_at_its_own_learning_rate,
    a_parameter_added_later_starts_at_step_one,
    batches_add_up_to_the_gradient_of_all_rows,
    clipping_scales_all_gradients_to_the_norm,
    inactive_and_merged_adapters_are_not_trained,
);

/// Two layers with ReLU between them and an adapter on the second: all parameters, in f64.
#[derive(Clone)]
struct Net {
    x: Mat,
    first: Mat,
    w: Mat,
    bias: Mat,
    a: Mat,
    b: Mat,
    lora_bias: Option<Mat>,
    magnitude: Option<Mat>,
    dy: Mat,
    scale: f64,
    mask: Mat,
    /// `‖W + scale·B·A‖` by rows, a constant.
    norm: Mat,
}

impl Net {
    fn new(dora: bool, lora_bias: bool, dropout: Option<Dropout>) -> Self {
        let (m, k, j, n, r) = (4, 5, 6, 7, 3);
        let mut rng = Rng::new(17);
        let mut mat =
            |rows, cols| Mat::from_vec(rows, cols, (0..rows * cols).map(|_| f64::from(rng.gaussian() as f32)).collect());
        let net = Self {
            x: mat(m, k),
            first: mat(j, k),
            w: mat(n, j),
            bias: mat(1, n),
            a: mat(r, j),
            b: mat(n, r),
            lora_bias: lora_bias.then(|| mat(1, n)),
            magnitude: dora.then(|| mat(1, n)),
            dy: mat(m, n),
            scale: 0.75,
            mask: dropout.map_or(Mat::new(m, j, |_, _| 1.0), |dropout| mask(dropout, m, j)),
            norm: Mat::new(1, n, |_, _| 1.0),
        };
        let merged = net.merged();
        let norm = Mat::new(1, n, |_, i| (0..j).map(|j| merged.at(i, j).powi(2)).sum::<f64>().sqrt());
        Self { norm, ..net }
    }

    fn merged(&self) -> Mat {
        &self.w + &(&(&self.b * &self.a) * self.scale)
    }

    /// The loss `Σ dy·y`. DoRA as in PEFT: `base(x) + (c - 1)·drop(x)·Wᵀ + c·scale·drop(x)·Aᵀ·Bᵀ`.
    fn loss(&self) -> f64 {
        let hidden = (&self.x * &self.first.t()).map(|x| x.max(0.0));
        let seen = hidden.times(&self.mask);
        let (base, through) = ((&hidden * &self.w.t()).plus_row(&self.bias), &seen * &self.w.t());
        let update = &(&(&seen * &self.a.t()) * &self.b.t()) * self.scale;
        let y = match &self.magnitude {
            None => &base + &update,
            Some(magnitude) => Mat::new(base.rows, base.cols, |i, j| {
                let c = magnitude.at(0, j) / self.norm.at(0, j);
                base.at(i, j) + (c - 1.0) * through.at(i, j) + c * update.at(i, j)
            }),
        };
        let y = self.lora_bias.as_ref().map_or(y.clone(), |bias| y.plus_row(&(bias * self.scale)));
        y.times(&self.dy).sum()
    }

    /// Gradients by central differences, which are exact except for rounding, because nearly all formulas are linear in each element.
    fn gradient(&self, part: impl Fn(&mut Self) -> &mut Mat) -> Mat {
        let (mut net, step) = (self.clone(), 1e-5);
        let shape = part(&mut net).clone();
        let mut moved = |e: usize, by: f64| {
            part(&mut net).data[e] += by;
            let loss = net.loss();
            part(&mut net).data[e] -= by;
            loss
        };
        let data = (0..shape.data.len()).map(|e| (moved(e, step) - moved(e, -step)) / (2.0 * step)).collect();
        Mat { data, ..shape }
    }

    fn model<B: Backend<Elem = f32>>(&self, backend: &B, dropout: f32) -> Mlp<B> {
        let config = LoraConfig {
            scaling: lowrank::nn::Scaling::Raw,
            dropout,
            bias: Bias::LoraOnly,
            ..LoraConfig::new(self.a.rows, self.scale as f32)
        };
        let mut adapter = Adapter::from_tensors(up(backend, &self.a), up(backend, &self.b), config).unwrap();
        adapter = adapter.with_bias(up(backend, &self.bias));
        if let Some(lora_bias) = &self.lora_bias {
            adapter = adapter.with_lora_bias(up(backend, lora_bias));
        }
        if let Some(magnitude) = &self.magnitude {
            adapter = adapter.with_magnitude(up(backend, magnitude));
        }
        let other_bias = Tensor::zeros(backend, (1, self.w.rows)).unwrap();
        let layers = [(&self.first, None), (&self.w, Some(other_bias))];
        let layers = layers.map(|(w, bias)| Linear::from_tensors(up(backend, w), bias).unwrap());
        let mut model = Mlp::from_layers(layers.into()).unwrap();
        model.set_adapters(vec![("linear2".into(), adapter)]).unwrap();
        for (_, layer) in model.layers_mut().take(1) {
            layer.params_mut().for_each(|param| param.trainable = true); // shows the gradient of the adapter's input
        }
        model
    }
}

fn dense<B: Backend<Elem = f32>>(backend: &B, gradient: WeightGrad<'_, B>) -> Vec<f32> {
    let mat = |t: &Tensor<B>| Mat::from_vec(t.rows(), t.cols(), down(backend, t).into_iter().map(f64::from).collect());
    match gradient {
        WeightGrad::Dense(g) => down(backend, g),
        WeightGrad::Factored { dy, x } => (&mat(dy).t() * &mat(x)).data.into_iter().map(|x| x as f32).collect(),
    }
}

/// A bound on the rounding errors of sums of at most 40 elements of size one in f32, through two layers. The finite differences are
/// accurate to 1e-9.
const CLOSE: f64 = 2e-6;

fn every_part_of_an_adapter_gets_its_gradient<B: Backend<Elem = f32>>(backend: &B) {
    let seed = 4;
    for (dora, lora_bias, dropout) in
        [(false, false, 0.0), (false, true, 0.0), (false, true, 0.4), (true, false, 0.0), (true, false, 0.4)]
    {
        // The second of two layers uses the seed 2·seed + 1.
        let drop = (dropout > 0.0).then(|| Dropout::new(dropout, 2 * seed + 1).unwrap());
        let net = Net::new(dora, lora_bias, drop);
        let model = net.model(backend, dropout);
        let mut tape = Tape::new(backend);
        let x = tape.input(up(backend, &net.x));
        let y = model.forward(&mut tape, x, Some(seed)).unwrap();
        let loss: f64 = down(backend, tape.value(y).unwrap()).iter().zip(&net.dy.data).map(|(&y, dy)| f64::from(y) * dy).sum();
        assert!((loss - net.loss()).abs() <= 1e-5 * net.dy.norm() * 10.0, "{loss}, want {}", net.loss());
        tape.seed(y, up(backend, &net.dy)).unwrap();
        let gradients = tape.backward().unwrap();

        let adapter = model.layer("linear2").unwrap().adapter(DEFAULT).unwrap();
        let first = model.layer("linear1").unwrap().base().weight();
        let check = |name: &str, param, want: Mat| {
            let error = relative_error(&dense(backend, gradients.get(param).expect(name)), &want);
            assert!(error <= CLOSE, "{name}, dora {dora}, lora_bias {lora_bias}, dropout {dropout}: off by {error:e}");
        };
        check("first", first, net.gradient(|net| &mut net.first));
        check("a", adapter.a(), net.gradient(|net| &mut net.a));
        check("b", adapter.b(), net.gradient(|net| &mut net.b));
        check("bias", adapter.bias().unwrap(), net.gradient(|net| &mut net.bias));
        if lora_bias {
            check("lora_bias", adapter.lora_bias().unwrap(), net.gradient(|net| net.lora_bias.as_mut().unwrap()));
        }
        if dora {
            check("magnitude", adapter.magnitude().unwrap(), net.gradient(|net| net.magnitude.as_mut().unwrap()));
        }
        let parts = 4 + usize::from(lora_bias) + usize::from(dora);
        assert_eq!(gradients.len(), parts, "nothing else gets one");
    }
}

/// A model with an adapter whose `B` is not zero, and the gradients of a batch.
fn model<B: Backend<Elem = f32>>(backend: &B, config: &LoraConfig) -> Mlp<B> {
    let mut rng = Rng::new(5);
    let mut model = Mlp::new(backend, &[6, 5, 3], &mut rng).unwrap();
    let config = LoraConfig { init: Init::NonZero, ..config.clone() };
    model.add_adapters(backend, Targets::All, &config, &mut rng).unwrap();
    model
}

fn gradients<B: Backend<Elem = f32>>(backend: &B, model: &Mlp<B>, rows: std::ops::Range<usize>) -> Gradients<B> {
    let host: Vec<f32> = (0..4 * 6).map(|e| (e as f32 * 0.7).sin()).collect();
    let x = Tensor::from_slice(backend, (rows.len(), 6), &host[rows.start * 6..rows.end * 6]).unwrap();
    let mut tape = Tape::new(backend);
    let x = tape.input(x);
    let logits = model.forward(&mut tape, x, None).unwrap();
    tape.cross_entropy(logits, &Labels::new(backend, 3, &[0, 2, 1, 2][rows]).unwrap()).unwrap();
    tape.backward().unwrap()
}

fn all_params<B: Backend<Elem = f32>>(backend: &B, model: &mut Mlp<B>) -> Vec<(Vec<f32>, bool)> {
    model.params_mut().map(|param| (down(backend, param.tensor()), param.trainable)).collect()
}

/// The first step of Adam moves every element by the learning rate.
fn lora_plus_gives_b_and_biases_a_larger_learning_rate<B: Backend<Elem = f32>>(backend: &B) {
    let mut model = model(backend, &LoraConfig { bias: Bias::LoraOnly, use_dora: true, ..LoraConfig::new(2, 2.0) });
    let before = all_params(backend, &mut model);
    let grads = gradients(backend, &model, 0..4);
    let mut adam = Adam::new(1e-3).unwrap();
    adam.loraplus_lr_ratio = 16.0;
    adam.step(backend, model.params_mut(), &grads).unwrap();
    let moved: Vec<f32> = before
        .iter()
        .zip(all_params(backend, &mut model))
        .map(|((was, _), (is, _))| was.iter().zip(&is).map(|(was, is)| (was - is).abs()).fold(0.0, f32::max))
        .collect();
    // Of each layer: the weight, the bias, A, B, the magnitudes, the adapter's bias.
    let want = [0.0, 0.0, 1e-3, 16e-3, 16e-3, 16e-3];
    for (at, (moved, want)) in moved.iter().zip(want.iter().cycle()).enumerate() {
        assert!((moved - want).abs() <= 1e-4 * want, "parameter {at} moved by {moved}, want {want}");
    }
    let before = all_params(backend, &mut model);
    for ratio in [f32::NAN, -1.0, f32::INFINITY] {
        adam.loraplus_lr_ratio = ratio;
        let error = adam.step(backend, model.params_mut(), &grads).unwrap_err();
        assert!(matches!(error, Error::Value { name: "loraplus_lr_ratio", .. }), "{error}");
    }
    assert_eq!((all_params(backend, &mut model), adam.steps()), (before, 1));
}

/// After one step, two models that differ only in the weight decay differ by the decay.
fn weight_decay_holds_for_every_parameter_at_its_own_learning_rate<B: Backend<Elem = f32>>(backend: &B) {
    let config = LoraConfig { bias: Bias::LoraOnly, use_dora: true, ..LoraConfig::new(2, 2.0) };
    let stepped = |mut adam: Adam<B>| {
        let mut model = model(backend, &config);
        let (before, grads) = (all_params(backend, &mut model), gradients(backend, &model, 0..4));
        adam.loraplus_lr_ratio = 16.0;
        adam.step(backend, model.params_mut(), &grads).unwrap();
        (before, all_params(backend, &mut model))
    };
    let (before, plain) = stepped(Adam::new(1e-3).unwrap());
    let (_, decayed) = stepped(Adam::adamw(1e-3, 0.5).unwrap());
    // Of each layer: the weight, the bias, A, B, the magnitudes, the adapter's bias.
    let rates = [0.0, 0.0, 1e-3, 16e-3, 16e-3, 16e-3];
    for (at, rate) in rates.into_iter().cycle().take(before.len()).enumerate() {
        for ((was, plain), decayed) in before[at].0.iter().zip(&plain[at].0).zip(&decayed[at].0) {
            let (got, want) = (f64::from(*plain) - f64::from(*decayed), rate * 0.5 * f64::from(*was));
            // The factor, the product and both sums are rounded.
            let bound = 4.0 * 2f64.powi(-24) * (f64::from(was.abs()) + 16e-3);
            assert!((got - want).abs() <= bound, "parameter {at} decayed by {got}, want {want}");
        }
    }
    for wrong in [-0.1, f32::NAN, f32::INFINITY] {
        let error = Adam::<B>::adamw(1e-3, wrong).err().unwrap();
        assert!(matches!(error, Error::Value { name: "weight_decay", .. }), "{error}");
    }
}

/// If its steps were counted with those of older parameters, its first step would be several times the learning rate.
fn a_parameter_added_later_starts_at_step_one<B: Backend<Elem = f32>>(backend: &B) {
    let mut model = model(backend, &LoraConfig::new(2, 2.0));
    let other = LoraConfig { init: Init::NonZero, ..LoraConfig::new(1, 1.0) };
    model.add_adapter(backend, "other", Targets::All, &other, &mut Rng::new(6)).unwrap();
    let mut adam = Adam::new(1e-3).unwrap();
    let step = |model: &mut Mlp<B>, adam: &mut Adam<B>| {
        let grads = gradients(backend, model, 0..4);
        adam.step(backend, model.params_mut(), &grads).unwrap();
    };
    let moved = |model: &mut Mlp<B>, adam: &mut Adam<B>, name: &str| {
        let b = |model: &Mlp<B>| down(backend, model.layer("linear2").unwrap().adapter(name).unwrap().b().tensor());
        let was = b(model);
        step(model, adam);
        was.iter().zip(b(model)).map(|(was, is)| (was - is).abs()).fold(0.0, f32::max)
    };
    (0..100).for_each(|_| step(&mut model, &mut adam));
    model.set_active(&["other"]).unwrap();
    let other = moved(&mut model, &mut adam, "other");
    model.set_active(&[DEFAULT]).unwrap();
    model.reserve_rank(backend, DEFAULT, 5).unwrap(); // A and B are new parameters
    let new = moved(&mut model, &mut adam, DEFAULT);
    for moved in [other, new] {
        assert!((moved - 1e-3).abs() <= 1e-7, "moved by {moved}, want the learning rate");
    }
    assert_eq!(adam.steps(), 102);
}

fn batches_add_up_to_the_gradient_of_all_rows<B: Backend<Elem = f32>>(backend: &B) {
    let mut model =
        model(backend, &LoraConfig { bias: Bias::All, modules_to_save: vec!["linear2".into()], ..LoraConfig::new(2, 2.0) });
    let whole = gradients(backend, &model, 0..4);
    let mut sum = gradients(backend, &model, 0..2);
    sum.add(backend, gradients(backend, &model, 2..4)).unwrap();
    sum.scale(backend, 0.5).unwrap();
    let mut seen = 0;
    for param in model.params_mut() {
        let (Some(got), Some(want)) = (sum.get(param), whole.get(param)) else {
            assert!(sum.get(param).is_none() && whole.get(param).is_none());
            continue;
        };
        let want = dense(backend, want).into_iter().map(f64::from).collect();
        let error = relative_error(&dense(backend, got), &Mat::from_vec(param.tensor().rows(), param.tensor().cols(), want));
        assert!(error <= CLOSE, "off by {error:e}");
        seen += 1;
    }
    assert_eq!(seen, 5, "A, B and a bias; a weight and a bias");
    assert!(sum.scale(backend, f32::INFINITY).is_err());
}

fn clipping_scales_all_gradients_to_the_norm<B: Backend<Elem = f32>>(backend: &B) {
    let mut model = model(backend, &LoraConfig { modules_to_save: vec!["linear2".into()], ..LoraConfig::new(2, 2.0) });
    let mut grads = gradients(backend, &model, 0..4);
    let squares = |grads: &Gradients<B>, model: &mut Mlp<B>| -> f64 {
        let each = model.params_mut().filter_map(|param| grads.get(param).map(|g| dense(backend, g)));
        each.flatten().map(|g| f64::from(g).powi(2)).sum::<f64>().sqrt()
    };
    let norm = squares(&grads, &mut model);
    let found = grads.clip(backend, 2.0 * norm as f32).unwrap();
    assert!(
        (found - norm).abs() <= CLOSE * norm && (squares(&grads, &mut model) - norm).abs() <= CLOSE * norm,
        "below: as it was"
    );
    grads.clip(backend, norm as f32 / 4.0).unwrap();
    let clipped = squares(&grads, &mut model);
    assert!((clipped - norm / 4.0).abs() <= 1e-5 * norm, "{clipped}, want a quarter of {norm}");
    for wrong in [-1.0, f32::NAN] {
        assert!(matches!(grads.clip(backend, wrong), Err(Error::Value { name: "max_norm", .. })));
    }
    grads.scale(backend, 3e38).unwrap();
    grads.scale(backend, 3e38).unwrap();
    assert!(matches!(grads.clip(backend, 1.0), Err(Error::Value { name: "norm", .. })));
}

fn inactive_and_merged_adapters_are_not_trained<B: Backend<Elem = f32>>(backend: &B) {
    let mut model = model(backend, &LoraConfig::new(2, 2.0));
    let other = LoraConfig { init: Init::NonZero, ..LoraConfig::new(1, 1.0) };
    model.add_adapter(backend, "other", Targets::All, &other, &mut Rng::new(6)).unwrap();
    assert_eq!(gradients(backend, &model, 0..4).len(), 4);
    model.set_active(&["other", DEFAULT]).unwrap();
    assert_eq!(gradients(backend, &model, 0..4).len(), 8, "the sum of both");
    model.merge_as(backend, &[DEFAULT], Merge::default()).unwrap();
    assert_eq!(gradients(backend, &model, 0..4).len(), 4, "what is merged is a constant");
}
