//! From a folder to a slot of a bank.

use super::files::{at, bad_tensors};
use super::folder::Folder;
use super::kind::Kind;
use crate::error::Result;
use crate::nn::{HostAdapter, HostUpdate};

impl Folder {
    /// The updates of its layers, for a slot of an [`AdapterBank`](crate::nn::AdapterBank).
    ///
    /// Errors: [`Error::File`](crate::Error::File) and [`Error::Unsupported`](crate::Error::Unsupported) for an adapter that does more
    /// than add low-rank updates to linear layers: DoRA, biases, layers that it replaces, embeddings, convolutions, and `pissa` and
    /// `olora`, which belong to other weights.
    pub fn host_adapter(&self) -> Result<HostAdapter> {
        self.only_factors()?;
        let mut updates = std::collections::BTreeMap::new();
        for (name, factors) in self.modules() {
            if *self.kind(name) != Kind::Linear {
                return Err(at(
                    self.dir(),
                    bad_tensors(format!("`{name}` is not a linear layer, and a bank holds adapters of linear layers")),
                ));
            }
            let (a, b) = (factors.a.values().to_vec(), factors.b.values().to_vec());
            updates.insert(name.clone(), HostUpdate { a, b, scaling: factors.scaling });
        }
        Ok(HostAdapter { updates })
    }
}
