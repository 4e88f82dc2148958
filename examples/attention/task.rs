//! The task that the adapters learn: to predict the previous token.

use lowrank::autograd::Tape;
use lowrank::nn::{Adam, Adaptable, Adapters};
use lowrank::op::Labels;
use lowrank::random::Rng;
use lowrank::{Backend, Float, Result, Tensor};

use super::model::{Decoder, Sizes};
use super::ops::Attention;

/// Two blocks, small enough to be trained in seconds.
pub const SIZES: Sizes = Sizes { blocks: 2, width: 16, hidden: 24, classes: 4, attention: Attention { heads: 2, length: 6 } };

/// A batch of sequences: the embeddings of their tokens, and the previous token of each (of the first token: itself).
pub struct Batch<B: Backend> {
    /// `m×width`
    pub x: Tensor<B>,
    /// One label for each row.
    pub labels: Labels<B>,
}

impl<B: Backend> Batch<B> {
    /// A batch of random sequences, which depend only on the seed.
    pub fn new(backend: &B, sequences: usize, seed: u64) -> Result<Self> {
        let Sizes { width, classes, attention, .. } = SIZES;
        let table: Vec<f32> = (0..classes * width).map(|at| (1.7 * at as f32 * (1 + at / width) as f32).sin()).collect();
        let mut rng = Rng::new(seed);
        let tokens: Vec<usize> = (0..sequences * attention.length).map(|_| rng.below(classes)).collect();
        let rows = tokens.iter().enumerate().flat_map(|(at, &token)| {
            let place = (at % attention.length) as f32;
            let embedding = table[token * width..][..width].iter().enumerate();
            embedding.map(move |(j, x)| B::Elem::from_f32(x + 0.7 * (place * (1 + j % 4) as f32 + j as f32).cos()))
        });
        let rows: Vec<B::Elem> = rows.collect();
        let before = |at: usize| tokens[at - usize::from(!at.is_multiple_of(attention.length))] as u32;
        let labels: Vec<u32> = (0..tokens.len()).map(before).collect();
        Ok(Self {
            x: Tensor::from_slice(backend, (tokens.len(), width), &rows)?,
            labels: Labels::new(backend, classes, &labels)?,
        })
    }
}

/// Trains the trainable parameters, and returns the loss of every step.
pub fn train<B: Backend>(backend: &B, model: &mut Decoder<B>, steps: u64, lr: f32) -> Result<Vec<f32>> {
    let mut adam = Adam::new(lr)?;
    let mut losses = Vec::new();
    for step in 0..steps {
        let batch = Batch::new(backend, 8, step)?;
        let mut tape = Tape::new(backend);
        let x = tape.input(batch.x);
        let logits = model.forward(&mut tape, x, Some(step), Adapters::Active)?;
        let loss = tape.cross_entropy(logits, &batch.labels)?;
        let gradients = tape.backward()?;
        adam.step(backend, model.params_mut(), &gradients)?;
        losses.push(loss.to_vec(backend)?[0]);
    }
    Ok(losses)
}
