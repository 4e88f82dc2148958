//! Text, token by token: greedy or sampled, one prompt or many, each with an adapter of its own.

use std::ops::Range;

use candle_core::{DType, Tensor};
use lowrank::random::{Rng, philox};

use crate::linear::{Chosen, Pass};
use crate::model::{Cache, CausalLm, Tokens};
use crate::numeric::{max, vectorised};
use crate::peft::{check_names, check_unmerged};
use crate::{Error, Result};

/// How tokens are chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// The most tokens that are made.
    pub max_new_tokens: usize,
    /// 0: always the likeliest token. Above: likelihoods to the power of `1 / temperature`.
    pub temperature: f64,
    /// Only the likeliest tokens that together have this likelihood; 1: all.
    pub top_p: f64,
    /// The seed of the choices.
    pub seed: u64,
    /// Tokens that end a text, beside those that `config.json` names.
    pub stops: Vec<u32>,
}

impl Sampling {
    /// The likeliest token each time, at most so many.
    pub fn greedy(max_new_tokens: usize) -> Self {
        Self { max_new_tokens, temperature: 0.0, top_p: 1.0, seed: 0, stops: Vec::new() }
    }

    fn check(&self) -> Result<()> {
        let (temperature, top_p) = (self.temperature, self.top_p);
        Error::unless(
            temperature.is_finite() && temperature >= 0.0,
            "temperature",
            temperature,
            "a number that is not negative",
        )?;
        Error::unless(top_p > 0.0 && top_p <= 1.0, "top_p", top_p, "above 0 and at most 1")
    }

    /// A token by its logits.
    fn pick(&self, logits: &[f32], rng: &mut Rng) -> u32 {
        let most = vectorised!(max(logits));
        let best = logits.iter().position(|&logit| logit == most).unwrap_or(0);
        if self.temperature == 0.0 {
            return best as u32;
        }
        let weight = |at: usize| (f64::from(logits[at] - logits[best]) / self.temperature).exp();
        let mut order: Vec<(usize, f64)> = (0..logits.len()).map(|at| (at, weight(at))).collect();
        let all: f64 = order.iter().map(|(_, weight)| weight).sum();
        let mut kept = all;
        if self.top_p < 1.0 {
            order.sort_by(|(i, left), (j, right)| right.total_cmp(left).then(i.cmp(j)));
            let (mut sum, mut len) = (0.0, 0);
            while len < order.len() && sum < self.top_p * all {
                sum += order[len].1;
                len += 1;
            }
            order.truncate(len);
            kept = sum;
        }
        let mut left = rng.unit() * kept;
        let found = order.iter().find(|(_, weight)| {
            left -= weight;
            left < 0.0
        });
        found.map_or(best, |&(at, _)| at) as u32
    }
}

/// A text that is being made.
struct Row<'p> {
    /// Its place among the prompts.
    place: usize,
    adapter: Option<&'p str>,
    /// What the model has not seen yet.
    next: Vec<u32>,
    made: Vec<u32>,
    cache: Cache,
    rng: Rng,
    done: bool,
}

impl CausalLm {
    /// The tokens that follow a prompt, with the active adapters. A token that ends the text is not among them.
    ///
    /// Errors: for an empty prompt, one with tokens that the vocabulary does not have, more tokens than the model has positions, and
    /// settings out of range.
    pub fn generate(&self, prompt: &[u32], sampling: &Sampling) -> Result<Vec<u32>> {
        self.generate_with(prompt, sampling, |_| {})
    }

    /// [`generate`](Self::generate), which hands out each token as soon as it is made.
    pub fn generate_with(&self, prompt: &[u32], sampling: &Sampling, mut each: impl FnMut(u32)) -> Result<Vec<u32>> {
        let mut rows = [self.row(0, prompt, None, sampling)?];
        while !rows[0].done {
            let made = rows[0].made.len();
            self.advance(&mut rows, false, sampling)?;
            rows[0].made[made..].iter().for_each(|&token| each(token));
        }
        let [row] = rows;
        Ok(row.made)
    }

    /// The tokens that follow each prompt, in one batch: each with the adapter that is named beside it, or with none.
    ///
    /// Errors: those of [`generate`](Self::generate); for a name that no adapter has, and while an adapter is merged.
    pub fn generate_mixed(&self, prompts: &[(&[u32], Option<&str>)], sampling: &Sampling) -> Result<Vec<Vec<u32>>> {
        let names: Vec<&str> = prompts.iter().filter_map(|(_, adapter)| *adapter).collect();
        check_names(self, &names)?;
        check_unmerged(self)?;
        let rows = prompts.iter().enumerate().map(|(place, (prompt, adapter))| self.row(place, prompt, *adapter, sampling));
        let mut rows = rows.collect::<Result<Vec<_>>>()?;
        rows.sort_by_key(|row| row.adapter); // rows of one adapter follow one another
        while rows.iter().any(|row| !row.done) {
            self.advance(&mut rows, true, sampling)?;
        }
        rows.sort_by_key(|row| row.place);
        Ok(rows.into_iter().map(|row| row.made).collect())
    }

    fn row<'p>(&self, place: usize, prompt: &[u32], adapter: Option<&'p str>, sampling: &Sampling) -> Result<Row<'p>> {
        sampling.check()?;
        Error::unless(!prompt.is_empty(), "prompt", "empty", "at least one token")?;
        let (got, room) = (prompt.len() + sampling.max_new_tokens.saturating_sub(1), self.config().max_positions);
        Error::unless(
            got <= room,
            "max_new_tokens",
            format!("{got} tokens with the prompt"),
            format!("at most the {room} of the model"),
        )?;
        let seed = sampling.seed;
        let words = philox([seed as u32, (seed >> 32) as u32], [place as u32, 0, 0, 1]);
        let rng = Rng::new(u64::from(words[0]) | u64::from(words[1]) << 32);
        let done = sampling.max_new_tokens == 0;
        Ok(Row { place, adapter, next: prompt.to_vec(), made: Vec::new(), cache: Cache::new(), rng, done })
    }

    /// One token more for each row that is not done. Mixed: each with its own adapter; else with the active ones.
    fn advance(&self, rows: &mut [Row<'_>], mixed: bool, sampling: &Sampling) -> Result<()> {
        let mut live: Vec<&mut Row<'_>> = rows.iter_mut().filter(|row| !row.done).collect();
        let sequences: Vec<&[u32]> = live.iter().map(|row| row.next.as_slice()).collect();
        let tokens = Tokens::batch(&sequences);
        let adapters: Vec<Option<&str>> = live.iter().map(|row| row.adapter).collect();
        let mut caches: Vec<Cache> = live.iter_mut().map(|row| std::mem::take(&mut row.cache)).collect();

        let of_tokens = grouped(adapters.iter().copied().zip(tokens.sequences().iter().cloned()));
        let of_rows = grouped(adapters.iter().enumerate().map(|(at, adapter)| (*adapter, at..at + 1)));
        let chosen = |rows| if mixed { Chosen::Rows(rows) } else { Chosen::Active };
        let pass = Pass { adapters: chosen(&of_tokens), ..Pass::inference() };
        let hidden = self.hidden_after(&tokens, &pass, &mut caches)?;
        let last: Vec<u32> = tokens.sequences().iter().map(|rows| rows.end as u32 - 1).collect();
        let hidden = hidden.index_select(&Tensor::new(last.as_slice(), hidden.device())?, 0)?;
        let logits = self.logits(&hidden, &Pass { adapters: chosen(&of_rows), ..pass })?;
        let logits = logits.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        for ((row, cache), logits) in live.iter_mut().zip(caches).zip(&logits) {
            let token = sampling.pick(logits, &mut row.rng);
            row.done = self.config().eos.contains(&token) || sampling.stops.contains(&token);
            if !row.done {
                row.made.push(token);
                row.done = row.made.len() == sampling.max_new_tokens;
                (row.cache, row.next) = (cache, vec![token]);
            }
        }
        Ok(())
    }
}

/// The rows of each adapter, as one range where they follow one another.
fn grouped<'p>(rows: impl Iterator<Item = (Option<&'p str>, Range<usize>)>) -> Vec<(Range<usize>, &'p str)> {
    let mut groups: Vec<(Range<usize>, &str)> = Vec::new();
    for (adapter, rows) in rows {
        let Some(adapter) = adapter else { continue };
        match groups.last_mut() {
            Some((group, name)) if *name == adapter && group.end == rows.start => group.end = rows.end,
            _ => groups.push((rows, adapter)),
        }
    }
    groups
}
