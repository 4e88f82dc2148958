//! Each operation with a backward pass, against the plain formula on candle's own autograd.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{D, DType, Device, Result, Tensor, Var};

use crate::attention::{Attention, Heads, Past, attend};
use crate::config::ModelConfig;
use crate::gate::Gate;
use crate::loss::HeadLoss;
use crate::norm::RmsNorm;
use crate::rope::Rope;

fn random(seed: u64, shape: &[usize]) -> Var {
    let mut rng = lowrank::random::Rng::new(seed);
    let numbers: Vec<f32> = (0..shape.iter().product()).map(|_| rng.uniform(-1.0, 1.0) as f32).collect();
    Var::from_vec(numbers, shape, &Device::Cpu).unwrap()
}

fn largest(tensor: &Tensor) -> f32 {
    tensor.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

/// Values and gradients of two formulas, which must agree.
fn agree(vars: &[&Var], got: impl Fn() -> Result<Tensor>, want: impl Fn() -> Result<Tensor>) {
    let (got, want) = (got().unwrap(), want().unwrap());
    assert_eq!(got.dims(), want.dims());
    let close = |got: &Tensor, want: &Tensor| largest(&(got - want).unwrap()) / largest(want).max(1e-9);
    assert!(close(&got, &want) < 2e-5, "value: {}", close(&got, &want));
    let dy = random(99, want.dims());
    let gradients = |y: &Tensor| (y * dy.as_detached_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
    let (got, want) = (gradients(&got), gradients(&want));
    for (at, var) in vars.iter().enumerate() {
        let (got, want) = (got.get(var.as_tensor()).unwrap(), want.get(var.as_tensor()).unwrap());
        assert!(close(got, want) < 2e-5, "gradient {at}: {}", close(got, want));
    }
}

#[test]
fn norm_and_gate() {
    let (x, w) = (random(1, &[3, 7, 40]), random(2, &[20]));
    let norm = RmsNorm::new(w.as_detached_tensor(), 1e-3).unwrap();
    agree(
        &[&x],
        || norm.forward(&x),
        || {
            let x = x.reshape((3, 7, 2, 20))?;
            let root = (x.sqr()?.mean_keepdim(D::Minus1)? + 1e-3)?.sqrt()?;
            x.broadcast_div(&root)?.broadcast_mul(&w.as_detached_tensor())?.reshape((3, 7, 40))
        },
    );
    let (g, u) = (random(3, &[9, 333]), random(4, &[9, 333]));
    agree(&[&g, &u], || Gate::forward(&g.affine(8.0, 0.0)?, &u), || g.affine(8.0, 0.0)?.silu()? * u.as_tensor());
}

/// A model's shape with heads of 8 columns.
fn config(more: &str) -> ModelConfig {
    let text = format!(
        r#"{{"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
            "num_attention_heads": 4, "num_key_value_heads": 2{more}}}"#
    );
    ModelConfig::from_json(text.as_bytes()).unwrap()
}

#[test]
fn rotary_positions() {
    let (x, positions) = (random(1, &[5, 32]), [0, 1, 2, 0, 30]);
    let angles = Rope::new(&config("")).angles(&positions);
    agree(
        &[&x],
        || angles.turn(&x),
        || {
            let at = Tensor::new(&[0f32, 1.0, 2.0, 0.0, 30.0], &Device::Cpu)?.reshape((5, 1))?;
            let frequencies = Tensor::new(&[1f32, 0.1, 0.01, 0.001], &Device::Cpu)?.reshape((1, 4))?;
            let angles = at.matmul(&frequencies)?;
            let x = x.reshape((5, 4, 8))?.transpose(0, 1)?.unsqueeze(0)?.contiguous()?;
            let turned = candle_nn::rotary_emb::rope_slow(&x, &angles.cos()?, &angles.sin()?)?;
            turned.squeeze(0)?.transpose(0, 1)?.reshape((5, 32))
        },
    );
}

const HEADS: Heads = Heads { q: 4, kv: 2, dim: 8 };

/// Attention of whole sequences in candle's operations.
fn plain_attention(q: &Tensor, k: &Tensor, v: &Tensor, sequences: &[Range<usize>]) -> Result<Tensor> {
    let part = |rows: &Range<usize>| -> Result<Tensor> {
        let t = rows.len();
        let heads = |x: &Tensor, n: usize| x.narrow(0, rows.start, t)?.reshape((t, n, HEADS.dim))?.transpose(0, 1)?.contiguous();
        let repeat = |x: Tensor| x.unsqueeze(1)?.broadcast_as((2, 2, t, HEADS.dim))?.reshape((4, t, HEADS.dim))?.contiguous();
        let (q, k, v) = (heads(q, 4)?, repeat(heads(k, 2)?)?, repeat(heads(v, 2)?)?);
        let mask = (0..t).flat_map(|i| (0..t).map(move |j| if j > i { f32::NEG_INFINITY } else { 0.0 })).collect();
        let scores =
            (q.matmul(&k.t()?)? / (HEADS.dim as f64).sqrt())?.broadcast_add(&Tensor::from_vec(mask, (1, t, t), &Device::Cpu)?)?;
        candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&v)?.transpose(0, 1)?.reshape((t, HEADS.q * HEADS.dim))
    };
    Tensor::cat(&sequences.iter().map(part).collect::<Result<Vec<_>>>()?, 0)
}

#[test]
fn attention_of_sequences_longer_than_a_block() {
    // 150 and 300 rows are more than one block and more than two.
    let sequences = Arc::new(vec![0..150, 150..151, 151..451]);
    let (q, k, v) = (random(1, &[451, 32]), random(2, &[451, 16]), random(3, &[451, 16]));
    let attention = Attention::new(HEADS, sequences.clone());
    let sharp = || q.affine(6.0, 0.0);
    agree(&[&q, &k, &v], || attention.forward(&sharp()?, &k, &v), || plain_attention(&sharp()?, &k, &v, &sequences));
}

#[test]
fn attention_behind_a_past_is_that_of_the_whole() {
    let (q, k, v) = (random(1, &[200, 32]), random(2, &[200, 16]), random(3, &[200, 16]));
    let want = plain_attention(&q, &k, &v, &[0..140, 140..200]).unwrap();
    let (mut first, mut second) = (Past::default(), Past::default());
    let rows = |x: &Var, a: Range<usize>, b: Range<usize>| {
        let part = |rows: Range<usize>| x.narrow(0, rows.start, rows.len()).unwrap();
        Tensor::cat(&[part(a), part(b)], 0).unwrap().contiguous().unwrap()
    };
    for (a, b) in [(0..130, 140..142), (130..131, 142..143), (131..140, 143..200)] {
        let parts = [&q, &k, &v].map(|x| rows(x, a.clone(), b.clone()));
        let sequences = [0..a.len(), a.len()..a.len() + b.len()];
        let got = attend(HEADS, [&parts[0], &parts[1], &parts[2]], &sequences, &mut [&mut first, &mut second]).unwrap();
        let want =
            Tensor::cat(&[want.narrow(0, a.start, a.len()).unwrap(), want.narrow(0, b.start, b.len()).unwrap()], 0).unwrap();
        assert!(largest(&(got - want).unwrap()) < 1e-5);
    }
}

#[test]
fn loss_of_the_rows_that_count() {
    // More rows than have logits at a time.
    let (h, head) = (random(1, &[300, 24]), random(2, &[50, 24]));
    let labels: Vec<Option<u32>> = (0..300).map(|row| (row % 3 > 0).then_some(row * 7 % 50)).collect();
    agree(
        &[&h],
        || HeadLoss::new(head.as_detached_tensor(), &labels, 17.0).forward(&h),
        || {
            let rows: Vec<u32> = (0..300).filter(|row| labels[*row as usize].is_some()).collect();
            let picked = h.index_select(&Tensor::new(rows.as_slice(), &Device::Cpu)?, 0)?;
            let logits = picked.matmul(&head.as_detached_tensor().t()?)?;
            let labels: Vec<u32> = labels.iter().flatten().copied().collect();
            let mean = candle_nn::loss::cross_entropy(&logits, &Tensor::new(labels.as_slice(), &Device::Cpu)?)?;
            mean * (rows.len() as f64 / 17.0)
        },
    );
    let none = HeadLoss::new(head.as_detached_tensor(), &vec![None; 300], 1.0).forward(&h).unwrap();
    assert_eq!(none.to_scalar::<f32>().unwrap(), 0.0);
    assert_eq!(largest(none.backward().unwrap().get(h.as_tensor()).unwrap()), 0.0);
}

#[test]
fn sixteen_bits_are_close() {
    let sequences = Arc::new(vec![0..20, 20..33]);
    let (q, k, v) = (random(1, &[33, 32]), random(2, &[33, 16]), random(3, &[33, 16]));
    for (dtype, tolerance) in [(DType::BF16, 0.03), (DType::F16, 0.004)] {
        let narrow = |x: &Var| x.to_dtype(dtype);
        let got =
            Attention::new(HEADS, sequences.clone()).forward(&narrow(&q).unwrap(), &narrow(&k).unwrap(), &narrow(&v).unwrap());
        let got = got.unwrap().to_dtype(DType::F32).unwrap();
        let want = plain_attention(&q, &k, &v, &sequences).unwrap();
        assert!(largest(&(got - want).unwrap()) < tolerance);
    }
}

#[test]
fn configs_that_are_not_honoured_are_refused_by_name() {
    let error = |more: &str| {
        let text = format!(
            r#"{{"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4{more}}}"#
        );
        ModelConfig::from_json(text.as_bytes()).map(|_| ()).unwrap_err().to_string()
    };
    for (more, word) in [
        (r#", "hidden_act": "gelu""#, "hidden_act"),
        (r#", "num_key_value_heads": 3"#, "num_key_value_heads"),
        (r#", "rope_scaling": {"rope_type": "yarn", "factor": 2.0}"#, "yarn"),
        (r#", "rope_parameters": {"rope_type": "llama3", "factor": 2.0}"#, "low_freq_factor"),
        (r#", "use_sliding_window": true"#, "use_sliding_window"),
        (r#", "quantization_config": {}"#, "quantization_config"),
        (r#", "num_hidden_layers": 0"#, "num_hidden_layers"),
        (r#", "eos_token_id": -1"#, "eos_token_id"),
    ] {
        assert!(error(more).contains(word) && error(more).contains("config.json"), "{more}: {}", error(more));
    }
    assert!(ModelConfig::from_json(b"{\"model_type\": \"mamba\"}").unwrap_err().to_string().contains("mamba"));
}
