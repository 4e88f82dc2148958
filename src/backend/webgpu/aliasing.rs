//! Refuses aliased operands: a WebGPU launch may not read and write the same buffer. Checked for each verb, before anything is
//! recorded, so that errors name its operands.

use std::ops::Range;

use super::WebGpu;
use crate::element::{Element, Float};
use crate::error::{Error, Result};
use crate::op::Factor;
use crate::view::MatRef;

/// The memory of an operand of a verb.
pub(super) struct Operand<'a> {
    name: &'static str,
    buffer: &'a wgpu::Buffer,
    /// From the first element to the last.
    bytes: Range<usize>,
    is_written: bool,
}

/// An operand that the verb reads.
pub(super) fn read<'a, E: Float, T: Element>(name: &'static str, view: MatRef<'a, WebGpu<E>, T>) -> Operand<'a> {
    let (memory, span) = (view.memory(), view.span());
    let [start, end] = [span.start, span.end].map(|element| (memory.first() + element) * size_of::<T>());
    Operand { name, buffer: memory.raw(), bytes: start..end, is_written: false }
}

/// A factor that the verb reads.
pub(super) fn read_factor<'a, E: Float>(name: &'static str, factor: Factor<'a, WebGpu<E>>) -> Operand<'a> {
    match factor {
        Factor::Elem(view) => read(name, view),
        Factor::F32(view) => read(name, view),
    }
}

/// An operand that the verb writes.
pub(super) fn written<'a, E: Float, T: Element>(name: &'static str, view: MatRef<'a, WebGpu<E>, T>) -> Operand<'a> {
    Operand { is_written: true, ..read(name, view) }
}

/// Errors: [`Error::Value`] if a written operand shares its buffer with one that is read, or memory with another that is written.
/// Only lent buffers can: each tensor has a buffer of its own.
pub(super) fn check_aliasing<'a>(verb: &'static str, operands: impl Iterator<Item = Operand<'a>>) -> Result<()> {
    let operands: Vec<_> = operands.filter(|operand| !operand.bytes.is_empty()).collect();
    for (number, one) in operands.iter().enumerate() {
        for other in &operands[number + 1..] {
            if one.buffer != other.buffer || one.name == other.name {
                continue;
            }
            let overlap = one.bytes.start < other.bytes.end && other.bytes.start < one.bytes.end;
            let (name, got, want) = match (one.is_written, other.is_written) {
                (false, true) => (other.name, format!("in the buffer of `{}`", one.name), BUFFER),
                (true, false) => (one.name, format!("in the buffer of `{}`", other.name), BUFFER),
                (true, true) if overlap => (other.name, format!("in the memory of `{}`", one.name), "memory of its own"),
                _ => continue,
            };
            return Err(Error::Value { verb, name, got, want: want.into() });
        }
    }
    Ok(())
}

const BUFFER: &str = "a buffer that the verb does not read: a WebGPU launch may not read and write one buffer";
