//! Adapters for any model of candle's, unforked: merged in place into the weights that the live model holds.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::safetensors::BufferedSafetensors;
use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use lowrank::adapter::{Factors, Folder, Kind};

use crate::merge::{Undo, merge};
use crate::{Error, Result};

/// The weights of a model, which remembers the tensors that it hands out. Models hold clones of them, which share their memory, so an
/// adapter that is merged here is in the live model.
///
/// Several adapters can be merged; each is added up. Switching costs a merge, and none of the model's layers knows. A forward pass that
/// runs while adapters are switched sees some weights with and some without them: wait for it.
///
/// A model that makes other tensors of its weights as it is built (transposes them, puts several into one) does not see what is merged.
///
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// use lowrank_candle::{Shared, lowrank::adapter::{Factors, Folder, HostMatrix}};
///
/// let weight = Tensor::zeros((2, 2), DType::F32, &Device::Cpu)?;
/// let shared = Shared::new([("proj.weight".to_string(), weight)].into());
/// let model = candle_nn::linear_no_bias(2, 2, shared.var_builder(DType::F32).pp("proj"))?; // or any of candle-transformers'
///
/// let (a, b) = (HostMatrix::new((1, 2), vec![1.0, 2.0])?, HostMatrix::new((2, 1), vec![3.0, 4.0])?);
/// let factors = Factors { a, b, scaling: 1.0, dtype: lowrank_candle::lowrank::DType::F32 };
/// let adapter = Folder::new(None, [("proj".to_string(), factors)].into())?; // Folder::read(dir)
/// let x = Tensor::new(&[[1f32, 1.0]], &Device::Cpu)?;
/// shared.merge(&adapter)?;
/// assert_eq!(model.forward(&x)?.to_vec2::<f32>()?, [[9.0, 12.0]]);
/// shared.unmerge()?;
/// assert_eq!(model.forward(&x)?.to_vec2::<f32>()?, [[0.0, 0.0]]);
/// # Ok::<(), lowrank_candle::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Shared {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    tensors: HashMap<String, Tensor>,
    /// What was handed out, of each name in each type.
    handed_out: HashMap<(String, DType), Tensor>,
    merged: Vec<(Tensor, Undo)>,
}

impl Shared {
    /// From tensors by the names of the checkpoint.
    pub fn new(tensors: HashMap<String, Tensor>) -> Self {
        Self { state: Arc::new(Mutex::new(State { tensors, ..State::default() })) }
    }

    /// From safetensors files. Errors: [`Error::File`].
    pub fn safetensors<P: AsRef<Path>>(files: &[P]) -> Result<Self> {
        let mut tensors = HashMap::new();
        for path in files.iter().map(AsRef::as_ref) {
            let bytes = std::fs::read(path).map_err(|error| Error::file(path, error))?;
            let file = BufferedSafetensors::new(bytes).map_err(|error| Error::file(path, error))?;
            for (name, _) in file.tensors() {
                let tensor = file.load(&name, &Device::Cpu).map_err(|error| Error::file(path, error))?;
                tensors.insert(name, tensor);
            }
        }
        Ok(Self::new(tensors))
    }

    /// What a model is built from; its weights are of this type, on the CPU.
    pub fn var_builder(&self, dtype: DType) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(self.clone()), dtype, Device::Cpu)
    }

    /// `W += scaling·B·A` for every module of an adapter, on top of those that are merged.
    ///
    /// The modules are found by their names, or by the end of a name where a model or an adapter has a prefix more (`bert.`).
    ///
    /// Errors: [`Error::Setting`] for a module that no weight handed out belongs to, or several; for adapters that do more than add a
    /// product of factors to linear layers (DoRA, biases, whole modules); for numbers that would not be finite. Nothing is changed then.
    pub fn merge(&self, adapter: &Folder) -> Result<()> {
        let plain = adapter.extras().is_empty() && adapter.config().principal().is_none();
        Error::unless(
            plain,
            "adapter",
            "more than factors beside weights",
            "factors alone, without biases, magnitudes or modules",
        )?;
        let mut state = self.lock();
        let before = state.merged.len();
        for (module, factors) in adapter.modules() {
            let linear = *adapter.kind(module) == Kind::Linear;
            let merged = Error::unless(linear, "adapter", format!("`{module}`, no linear layer"), "linear layers alone")
                .and_then(|()| state.merge(module, factors, adapter.config().fan_in_fan_out()));
            if let Err(error) = merged {
                state.unmerge_down_to(before)?;
                return Err(error);
            }
        }
        Ok(())
    }

    /// Takes every merged adapter out; the weights then are what they were, bit for bit.
    pub fn unmerge(&self) -> Result<()> {
        self.lock().unmerge_down_to(0)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn merge(&mut self, module: &str, factors: &Factors, fan_in_fan_out: bool) -> Result<()> {
        let name = self.weight_of(module)?;
        // W stored in × out: Wᵀ += scaling·B·A is W += scaling·Aᵀ·Bᵀ.
        let (a, b) = match fan_in_fan_out {
            false => (factors.a.clone(), factors.b.clone()),
            true => (factors.b.transposed(), factors.a.transposed()),
        };
        let tensor = |matrix: &lowrank::adapter::HostMatrix| {
            Tensor::from_slice(matrix.values(), (matrix.rows(), matrix.cols()), &Device::Cpu)
        };
        let (a, b) = (tensor(&a)?, tensor(&b)?);
        for w in self.handed_out.iter().filter(|((known, _), _)| *known == name).map(|(_, w)| w) {
            let (want, got) = ([b.dims()[0], a.dims()[1]], w.dims());
            Error::unless(got == want, "adapter", format!("for weights of {want:?} in `{module}`"), format!("{got:?}"))?;
            self.merged.push((w.clone(), merge(w, &a, &b, factors.scaling)?));
        }
        Ok(())
    }

    /// The name of the weight that a module has in the model.
    fn weight_of(&self, module: &str) -> Result<String> {
        let ends =
            |long: &str, short: &str| long.strip_suffix(short).is_some_and(|above| above.is_empty() || above.ends_with('.'));
        let weight = format!("{module}.weight");
        let handed_out = |name: &&String| self.handed_out.keys().any(|(known, _)| known == *name);
        let mut names: Vec<&String> =
            self.tensors.keys().filter(handed_out).filter(|name| ends(name, &weight) || ends(&weight, name)).collect();
        if let Some(exact) = names.iter().find(|name| ***name == weight) {
            names = vec![exact];
        }
        match names[..] {
            [name] => Ok(name.clone()),
            _ => Err(Error::setting(
                "adapter",
                format!("for `{module}`, which is {} weights of the model", names.len()),
                "for one",
            )),
        }
    }

    fn unmerge_down_to(&mut self, left: usize) -> Result<()> {
        while self.merged.len() > left {
            if let Some((w, undo)) = self.merged.last() {
                undo.run(w)?;
            }
            self.merged.pop();
        }
        Ok(())
    }

    /// A tensor of this type; the same each time.
    fn hand_out(&mut self, name: &str, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        let tensor = self.tensors.get(name).ok_or_else(|| candle_core::Error::CannotFindTensor { path: name.to_string() })?;
        if !device.is_cpu() {
            candle_core::bail!("lowrank-candle computes on the CPU: build the model there");
        }
        if let Some(there) = self.handed_out.get(&(name.to_string(), dtype)) {
            return Ok(there.clone());
        }
        if !self.merged.is_empty() {
            candle_core::bail!("a model is built while an adapter is merged: unmerge it first");
        }
        let tensor = tensor.to_dtype(dtype)?.contiguous()?;
        self.handed_out.insert((name.to_string(), dtype), tensor.clone());
        Ok(tensor)
    }
}

impl SimpleBackend for Shared {
    fn get(&self, shape: Shape, name: &str, _: Init, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        let tensor = self.lock().hand_out(name, dtype, device)?;
        if *tensor.shape() != shape {
            candle_core::bail!("`{name}` is {:?}, want {shape:?}", tensor.dims());
        }
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        self.lock().hand_out(name, dtype, device)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.lock().tensors.contains_key(name)
    }
}
