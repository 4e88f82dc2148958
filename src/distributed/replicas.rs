//! Ranks that begin with the same parameters, and a check that they still have them.

use super::{Communicator, check_root, gather};
use crate::autograd::Param;
use crate::backend::Backend;
use crate::element::{DType, Element, Float};
use crate::error::{Error, Result};

/// Overwrites the parameters of every rank with those of `root`, one collective for each and one more.
///
/// Every rank passes the same parameters in the same order: `model.params_mut()` for all, or those that are trainable, if every
/// rank has read the same base model.
///
/// Errors: [`Error::State`], which names the rank, if a rank has parameters of other shapes, or trains others; nothing is changed
/// then. [`Error::Value`] unless `root` is a rank.
pub fn broadcast_params<'p, B: Backend>(
    backend: &B,
    params: impl IntoIterator<Item = &'p mut Param<B>>,
    root: usize,
    comm: &impl Communicator,
) -> Result<()> {
    check_root(root, comm.size())?;
    let params: Vec<_> = params.into_iter().collect();
    let mut layout = Fingerprint::default();
    for param in &params {
        let (shape, size) = (param.tensor().shape(), B::Elem::DTYPE.size());
        [shape.rows, shape.cols, size, usize::from(param.trainable)].into_iter().for_each(|number| layout.word(number as u64));
        layout.word(u64::from(B::Elem::DTYPE == DType::F16));
    }
    let layouts = gather(comm, layout.value())?;
    if let Some(rank) = (0..comm.size()).find(|&rank| layouts[rank] != layouts[root]) {
        let reason = format!("rank {rank} has parameters of other shapes than rank {root}, or trains others");
        return Err(Error::State { verb: "broadcast", reason: reason.into() });
    }
    for param in params {
        let mut host = param.tensor().to_vec(backend)?;
        comm.broadcast(bytemuck::cast_slice_mut(&mut host), root)?;
        param.copy_from_slice(backend, &host)?;
    }
    Ok(())
}

/// Compares the parameters of all ranks, bit by bit, by a fingerprint of 64 bits: one collective.
///
/// Every rank passes the same parameters in the same order. Ranks that average their gradients keep equal bits; a rank that does
/// not has a fault of memory or of the program, and this finds it if it is called every so many steps.
///
/// Errors: [`Error::State`] on all ranks, which names those that differ from most others (from the lower rank, where as many have the
/// one as the other).
pub fn check_replicas<'p, B: Backend>(
    backend: &B,
    params: impl IntoIterator<Item = &'p mut Param<B>>,
    comm: &impl Communicator,
) -> Result<()> {
    if comm.size() == 1 {
        return Ok(());
    }
    let mut fingerprint = Fingerprint::default();
    for param in params {
        fingerprint.add(&param.tensor().to_vec(backend)?);
    }
    let all = gather(comm, fingerprint.value())?;
    let votes = |value: u64| all.iter().filter(|&&other| other == value).count();
    let most = (0..all.len()).rev().max_by_key(|&rank| votes(all[rank])).unwrap_or(0); // the lowest of those with most votes
    let differ: Vec<String> = (0..all.len()).filter(|&rank| all[rank] != all[most]).map(|rank| rank.to_string()).collect();
    if differ.is_empty() {
        return Ok(());
    }
    let (ranks, have) = if differ.len() == 1 { ("rank", "has") } else { ("ranks", "have") };
    let reason = format!("{ranks} {} {have} other parameters than rank {most}", differ.join(", "));
    Err(Error::State { verb: "go on training", reason: reason.into() })
}

/// A number of 64 bits that changes if any bit of the data does. Not cryptographic.
///
/// Each word is mixed in by an invertible function of the state, so that one word that differs always gives another number.
#[derive(Default)]
pub(crate) struct Fingerprint(u64);

impl Fingerprint {
    /// Mixes in a word.
    pub(crate) fn word(&mut self, word: u64) {
        let mixed = (self.0 ^ word).wrapping_mul(0x9E37_79B9_7F4A_7C15); // an odd number: invertible
        self.0 = (mixed ^ (mixed >> 32)).wrapping_add(0x632B_E59B_D9B4_E019);
    }

    /// Mixes in the bits of elements.
    pub(crate) fn add<T: Element>(&mut self, elements: &[T]) {
        self.bytes(bytemuck::cast_slice(elements));
    }

    /// Mixes in bytes, and their number.
    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.word(bytes.len() as u64);
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.word(u64::from_le_bytes(word));
        }
    }

    pub(crate) fn value(&self) -> u64 {
        self.0
    }
}
