//! The forward pass of a batch whose rows use adapters of their own.

use super::{AdapterBank, MixedRows, Sweep};
use crate::autograd::{LoraRows, Tape, TrainedSlot, Var};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::nn::{Layer, Mlp};
use crate::op::Dropout;

/// The adapters of a bank and which rows use them, for a forward pass.
pub struct Mixed<'m, B: Backend> {
    bank: &'m AdapterBank<B>,
    rows: &'m MixedRows<B>,
    /// The adapters that get gradients, if they are trained.
    sweep: Option<&'m Sweep<B>>,
}

impl<B: Backend> Clone for Mixed<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for Mixed<'_, B> {}

impl<B: Backend> AdapterBank<B> {
    /// For a forward pass. Errors: [`Error::Value`] for rows that another bank assigned.
    pub fn mixed<'m>(&'m self, rows: &'m MixedRows<B>) -> Result<Mixed<'m, B>> {
        Error::unless(rows.bank == self.id, "mixed", "rows", "assigned by another bank", "assigned by this one")?;
        Ok(Mixed { bank: self, rows, sweep: None })
    }
}

impl<'m, B: Backend> Mixed<'m, B> {
    /// With gradients for the parameters of a sweep.
    pub(super) fn trained(self, sweep: &'m Sweep<B>) -> Self {
        Self { sweep: Some(sweep), ..self }
    }

    /// The parameters of a layer that get gradients, for each segment.
    fn trained_slots(&self, layer: &str) -> Vec<TrainedSlot<'m, B>> {
        let Some(sweep) = self.sweep else { return Vec::new() };
        let rows = self.rows.assignment();
        let all = rows.rows() as f32;
        let of = |segment: &crate::op::Segment| {
            let [a, b] = sweep.params_in(segment.slot, layer)?;
            let own = rows.rows_of(segment).len() as f32;
            Some(TrainedSlot { a, b, weight: if sweep.own_means { all / own } else { 1.0 } })
        };
        rows.segments().iter().filter_map(of).collect()
    }
}

impl<B: Backend> Layer<B> {
    /// The base layer, and to each row what its adapter adds. `name` is the layer's in its model.
    ///
    /// Errors: [`Error::NoSuchLayer`] if the bank has no such layer; [`Error::Value`] while an adapter is merged; those of the tape.
    pub fn forward_mixed<'m>(
        &'m self,
        tape: &mut Tape<'m, B>,
        x: Var,
        name: &str,
        dropout: Option<Dropout>,
        mixed: Mixed<'m, B>,
    ) -> Result<Var> {
        if let Some(lora) = self.lora() {
            lora.check_unmerged("forward_mixed")?;
        }
        let known = || mixed.bank.layers.iter().map(|(known, _)| known.as_str()).collect::<Vec<_>>().join(", ");
        let bank = mixed.bank.layer(name).ok_or_else(|| Error::NoSuchLayer { name: name.into(), known: known() })?;
        let (w, bias, rows) = (Some(self.base().weight()), self.base().bias(), mixed.rows.assignment());
        tape.lora_rows(x, LoraRows { w, bias, bank, rows, dropout, trained: mixed.trained_slots(name) })
    }
}

impl<B: Backend> Mlp<B> {
    /// Logits of a batch in which each row uses an adapter of its own. `W` of each layer is read once, whatever the adapters are.
    /// `dropout` holds a probability and a seed.
    ///
    /// Errors: [`Error::InLayer`] for an `x` that does not fit; those of [`Layer::forward_mixed`].
    pub fn forward_mixed<'m>(
        &'m self,
        tape: &mut Tape<'m, B>,
        x: Var,
        dropout: Option<(f32, u64)>,
        mixed: Mixed<'m, B>,
    ) -> Result<Var> {
        use crate::nn::Adaptable;
        let (mut value, count) = (x, self.layers().count() as u64);
        for (i, (name, layer)) in self.layers().enumerate() {
            if i > 0 {
                value = tape.relu(value)?;
            }
            let seed = |seed: u64| seed.wrapping_mul(count).wrapping_add(i as u64);
            let dropout = dropout.map(|(p, of_step)| Dropout::new(p, seed(of_step))).transpose()?;
            value = layer.forward_mixed(tape, value, name, dropout, mixed).map_err(|error| error.in_layer(name))?;
        }
        Ok(value)
    }
}
