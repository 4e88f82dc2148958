//! The error type of the crate. Each message names what is wrong by the name that the caller knows it by.

use std::borrow::Cow;
use std::path::PathBuf;

use crate::tensor::Shape;

/// `std::result::Result` with this crate's [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a call was refused or failed. A refused request has changed nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An operand does not have the shape that follows from the other operands.
    #[error("{verb}: `{name}` is {got}, want {want}")]
    Shape {
        /// The operation, such as `lora_forward`.
        verb: &'static str,
        /// The field of the request.
        name: &'static str,
        /// The shape it has.
        got: Shape,
        /// The shape it must have.
        want: Shape,
    },

    /// A scalar, a setting or an element is outside its range, or an operand is missing or in a form that the operation does
    /// not take.
    #[error("{verb}: `{name}` is {got}, want {want}")]
    Value {
        /// The operation, such as `adam`.
        verb: &'static str,
        /// The field of the request, the parameter or the setting.
        name: &'static str,
        /// Its value.
        got: String,
        /// The accepted values.
        want: Cow<'static, str>,
    },

    /// Something is not in the state that the operation needs, such as an adapter that is disabled.
    #[error("cannot {verb}: {reason}")]
    State {
        /// The operation as a verb, such as `merge`.
        verb: &'static str,
        /// The state that prevents it, such as "adapter `terse` is disabled".
        reason: Cow<'static, str>,
    },

    /// An operation on a layer of a model failed.
    #[error("{error}, in `{layer}`")]
    InLayer {
        /// The name of the layer.
        layer: String,
        /// The error itself: [`Error::Shape`], [`Error::Value`] or [`Error::State`].
        error: Box<Error>,
    },

    /// A matrix has more elements than this machine can address, or than a device can hold in one piece.
    #[error("{shape} elements are more than {limit}")]
    TooLarge {
        /// The shape of the matrix.
        shape: Shape,
        /// The limit that it exceeds, in words.
        limit: &'static str,
    },

    /// No layer of the model has this name.
    #[error("no layer is named `{name}`; {}", there_are("layers", known))]
    NoSuchLayer {
        /// The name that was given.
        name: String,
        /// The existing names; empty if there are none.
        known: String,
    },

    /// No adapter of the model has this name.
    #[error("no adapter is named `{name}`; {}", there_are("adapters", known))]
    NoSuchAdapter {
        /// The name that was given.
        name: String,
        /// The existing names; empty if there are none.
        known: String,
    },

    /// The backend cannot run on this machine.
    #[error("{backend} is unavailable: {reason}")]
    Unavailable {
        /// The backend.
        backend: &'static str,
        /// Why it cannot run.
        reason: String,
    },

    /// The device is out of memory.
    #[error("{backend}: out of memory, allocating {}", allocation(*bytes))]
    OutOfMemory {
        /// The backend.
        backend: &'static str,
        /// Size of the allocation; 0 for memory that the driver allocates for itself, such as for a kernel.
        bytes: usize,
    },

    /// The device or its driver reported an error.
    #[error("{backend}: {reason}")]
    Device {
        /// The backend.
        backend: &'static str,
        /// The message of the driver.
        reason: String,
    },

    /// A file does not hold what it must, or is in the way. Functions that name this error also return [`Error::Io`], if the
    /// system cannot read or write a file.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The fault, in words.
        reason: String,
    },

    /// The system could not read or write a file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The error of the system.
        source: std::io::Error,
    },

    /// The caller asked to stop. Unfinished output was removed.
    #[error("interrupted; nothing was written")]
    Interrupted,

    /// A file has a setting that this crate does not support.
    #[error("{}: `{field}` is {value}, which is not supported", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The name of the setting.
        field: &'static str,
        /// The value of the setting.
        value: String,
    },
}

/// An allocation in words.
fn allocation(bytes: usize) -> String {
    if bytes == 0 { "data of the driver itself".into() } else { format!("{bytes} bytes") }
}

impl Error {
    /// [`Error::Value`], unless `valid`.
    pub(crate) fn unless(
        valid: bool,
        verb: &'static str,
        name: &'static str,
        got: impl ToString,
        want: &'static str,
    ) -> Result<()> {
        if valid {
            return Ok(());
        }
        Err(Self::Value { verb, name, got: got.to_string(), want: want.into() })
    }

    /// Adds the name of the layer to an error about an operand, a setting or a state, as [`Error::InLayer`]. Other errors stay
    /// as they are. For models that are written outside this crate.
    pub fn in_layer(self, layer: &str) -> Self {
        match self {
            Self::Shape { .. } | Self::Value { .. } | Self::State { .. } => {
                Self::InLayer { layer: layer.into(), error: Box::new(self) }
            }
            other => other,
        }
    }
}

/// A list of the names that exist.
fn there_are(what: &str, known: &str) -> String {
    if known.is_empty() { "there are none".into() } else { format!("the {what} are {known}") }
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;

    #[test]
    fn a_state_reads_as_a_sentence() {
        let state = Error::State { verb: "merge", reason: "adapter `terse` is disabled".into() };
        assert_eq!(state.to_string(), "cannot merge: adapter `terse` is disabled");
        assert_eq!(state.in_layer("fc1").to_string(), "cannot merge: adapter `terse` is disabled, in `fc1`");
    }

    #[test]
    fn errors_of_input_and_output_keep_their_source() {
        let error = crate::file::read("no such file".as_ref()).unwrap_err();
        let source = error.source().and_then(|source| source.downcast_ref::<std::io::Error>());
        assert!(error.to_string().starts_with("no such file: "), "{error}");
        assert_eq!(source.map(std::io::Error::kind), Some(std::io::ErrorKind::NotFound));
    }
}
