//! What can go wrong, in the caller's words.

use std::borrow::Cow;
use std::path::PathBuf;

use crate::tensor::Shape;

/// The result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a call was refused or failed. Nothing was changed when a request is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An operand does not have the shape that the other operands ask for.
    #[error("{verb}: `{name}` is {got}, want {want}")]
    Shape {
        /// What was asked for, such as `lora_forward`.
        verb: &'static str,
        /// The operand, as its request calls it.
        name: &'static str,
        /// The shape it has.
        got: Shape,
        /// The shape it must have.
        want: Shape,
    },

    /// A scalar, a setting or an element is outside what it may be.
    #[error("{verb}: `{name}` is {got}, want {want}")]
    Value {
        /// What was asked for, such as `adam`.
        verb: &'static str,
        /// The value, as its request calls it.
        name: &'static str,
        /// What it is.
        got: String,
        /// What it may be.
        want: Cow<'static, str>,
    },

    /// A layer of a model was asked for something that does not fit it.
    #[error("{error}, in `{layer}`")]
    InLayer {
        /// The layer.
        layer: String,
        /// What does not fit: [`Error::Shape`] or [`Error::Value`].
        error: Box<Error>,
    },

    /// A number of elements does not fit the address space, or not what a device can hold in one piece.
    #[error("{shape} elements are more than {limit}")]
    TooLarge {
        /// The shape asked for.
        shape: Shape,
        /// What it exceeds.
        limit: &'static str,
    },

    /// A name that the model does not have.
    #[error("no layer is named `{name}`; {}", there_are("layers", known))]
    NoSuchLayer {
        /// The name asked for.
        name: String,
        /// The names there are; empty if there are none.
        known: String,
    },

    /// A name that none of the model's adapters has.
    #[error("no adapter is named `{name}`; {}", there_are("adapters", known))]
    NoSuchAdapter {
        /// The name asked for.
        name: String,
        /// The names there are; empty if there are none.
        known: String,
    },

    /// The backend cannot run on this machine.
    #[error("{backend} is unavailable: {reason}")]
    Unavailable {
        /// The backend asked for.
        backend: &'static str,
        /// Why it is not there.
        reason: String,
    },

    /// The device had no room.
    #[error("{backend}: no memory for {}", asked(*bytes))]
    OutOfMemory {
        /// The backend that had no room.
        backend: &'static str,
        /// How much was asked for; 0 if that is the device's own affair, such as room for a kernel.
        bytes: usize,
    },

    /// The device, or its driver, reported a failure.
    #[error("{backend}: {reason}")]
    Device {
        /// The backend that failed.
        backend: &'static str,
        /// What the driver said.
        reason: String,
    },

    /// A file is missing, cannot be written, or does not hold what it must.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },

    /// The caller asked to stop. What was begun is gone.
    #[error("interrupted; nothing was written")]
    Interrupted,

    /// A file asks for something that this crate does not know how to honour.
    #[error("{}: `{field}` is {value}, which is not supported", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What asks for it.
        field: &'static str,
        /// What it is set to.
        value: String,
    },
}

/// What there was no memory for.
fn asked(bytes: usize) -> String {
    if bytes == 0 { "what it keeps itself".into() } else { format!("{bytes} bytes") }
}

impl Error {
    /// `Err` naming the scalar, unless it holds what it must.
    pub(crate) fn unless(
        holds: bool,
        verb: &'static str,
        name: &'static str,
        got: impl ToString,
        want: &'static str,
    ) -> Result<()> {
        if holds {
            return Ok(());
        }
        Err(Self::Value { verb, name, got: got.to_string(), want: want.into() })
    }

    /// The error with the name of the layer, if it is about an operand or a setting: [`Error::InLayer`]. For models of one's own.
    pub fn in_layer(self, layer: &str) -> Self {
        match self {
            Self::Shape { .. } | Self::Value { .. } => Self::InLayer { layer: layer.into(), error: Box::new(self) },
            other => other,
        }
    }
}

/// What there is instead of what was asked for.
fn there_are(what: &str, known: &str) -> String {
    if known.is_empty() { "there are none".into() } else { format!("the {what} are {known}") }
}
