//! What can go wrong, in the caller's words.

use std::path::{Path, PathBuf};

/// The result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a call was refused or failed. Nothing was changed when a request is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file is missing, cannot be written, or does not hold what it must.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },

    /// An argument or a setting is outside what it may be.
    #[error("`{name}` is {got}, want {want}")]
    Value {
        /// The argument or setting, by its name.
        name: &'static str,
        /// What it is.
        got: String,
        /// What it may be.
        want: String,
    },

    /// Refused or failed in lowrank: an adapter, a shape, a device.
    #[error(transparent)]
    Lowrank(#[from] lowrank::Error),

    /// Refused or failed in candle.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    /// [`Error::File`] of this file.
    pub(crate) fn file(path: &Path, reason: impl ToString) -> Self {
        Self::File { path: path.into(), reason: reason.to_string() }
    }

    /// [`Error::Value`] of this argument or setting.
    pub(crate) fn value(name: &'static str, got: impl ToString, want: impl ToString) -> Self {
        Self::Value { name, got: got.to_string(), want: want.to_string() }
    }

    /// `Err` naming the argument or setting, unless it holds what it must.
    pub(crate) fn unless(holds: bool, name: &'static str, got: impl ToString, want: impl ToString) -> Result<()> {
        if holds { Ok(()) } else { Err(Self::value(name, got, want)) }
    }
}

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(error) => error,
            other => Self::wrap(other),
        }
    }
}
