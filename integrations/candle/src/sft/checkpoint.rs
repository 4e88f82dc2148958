//! A run that is saved, and goes on to the same bits.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use lowrank::adapter::Folder;
use lowrank::file::{StagedFolder, write_whole};
use serde::{Deserialize, Serialize};

use super::{Sft, Trainer};
use crate::data::Position;
use crate::{Adaptable, Error, Result};

/// Where the run is.
const STATE: &str = "trainer_state.json";
/// The moments of the optimizer.
const MOMENTS: &str = "optimizer.safetensors";

#[derive(Serialize, Deserialize)]
struct State {
    step: usize,
    position: Position,
    settings: Sft,
}

impl Trainer<'_> {
    /// Writes the run to a new folder: the adapter as PEFT's folder, the moments of the optimizer and the place in the data. All of it,
    /// or nothing.
    ///
    /// Errors: for a folder that is there already, and files that cannot be written.
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<()> {
        let staged = StagedFolder::new(dir.as_ref())?;
        let inside = staged.inside();
        self.model.save_adapter(&self.adapter, inside)?;
        let mut moments = HashMap::new();
        for factor in &self.factors {
            let [m, v] = factor.moments()?;
            for (name, numbers) in [("m", m), ("v", v)] {
                moments.insert(format!("{name}.{}", factor.name), Tensor::from_vec(numbers, factor.var.shape(), &Device::Cpu)?);
            }
        }
        let path = inside.join(MOMENTS);
        write_whole(&path, &safetensors::serialize(moments, None).map_err(|error| Error::file(&path, error))?)?;
        let state = State { step: self.step, position: self.batches.position(), settings: self.settings.clone() };
        let path = inside.join(STATE);
        write_whole(&path, serde_json::to_string_pretty(&state).map_err(|error| Error::file(&path, error))?.as_bytes())?;
        Ok(staged.publish()?)
    }

    /// Goes on where a run with the same model, data and settings was [saved](Self::save). What follows has the bits that it would have
    /// had without the interruption.
    ///
    /// Errors: [`Error::File`] for a folder that is missing or damaged, or of a run with other settings, data or adapters. Nothing is
    /// changed then.
    pub fn resume(&mut self, dir: impl AsRef<Path>) -> Result<()> {
        let dir = dir.as_ref();
        let path = dir.join(STATE);
        let bytes = std::fs::read(&path).map_err(|error| Error::file(&path, error))?;
        let state: State = serde_json::from_slice(&bytes).map_err(|error| Error::file(&path, error))?;
        if state.settings != self.settings {
            return Err(Error::file(&path, "is of a run with other settings"));
        }
        let mut batches = self.batches.clone();
        batches.seek(state.position).map_err(|error| Error::file(&path, error))?;
        let (folder, path) = (Folder::read(dir)?, dir.join(MOMENTS));
        let moments = candle_core::safetensors::load(&path, &Device::Cpu).map_err(|error| Error::file(&path, error))?;
        let mut read = Vec::new();
        for factor in &self.factors {
            let missing = || Error::file(dir, format!("has nothing of `{}`", factor.name));
            let (layer, _) = factor.name.rsplit_once('.').unwrap_or_default();
            let factors = folder.modules().get(layer).ok_or_else(missing)?;
            let matrix = if factor.is_b { &factors.b } else { &factors.a };
            let moment = |name: &str| -> Result<Vec<f32>> {
                let moment = moments.get(&format!("{name}.{}", factor.name)).ok_or_else(missing)?;
                Ok(moment.flatten_all()?.to_vec1()?)
            };
            let (m, v) = (moment("m")?, moment("v")?);
            let fits = matrix.shape() == factor.var.dims2()?.into() && m.len() == v.len() && m.len() == factor.var.elem_count();
            if !fits {
                return Err(Error::file(dir, format!("has another size of `{}`", factor.name)));
            }
            read.push((Tensor::from_slice(matrix.values(), factor.var.shape(), &Device::Cpu)?, m, v));
        }
        for (factor, (numbers, m, v)) in self.factors.iter_mut().zip(read) {
            factor.var.set(&numbers)?;
            factor.set_moments(&m, &v)?;
        }
        (self.batches, self.step) = (batches, state.step);
        Ok(())
    }
}
