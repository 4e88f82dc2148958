//! What can go wrong, in one line and in the caller's words.

use std::path::{Path, PathBuf};

/// The result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why something was refused or failed. Nothing was changed when a call is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file cannot be read or written, or is not what it should be.
    #[error("{}: {problem}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },

    /// A line of a file is not what it should be.
    #[error("{}, line {line}: {problem}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line; the first is 1.
        line: usize,
        /// What is wrong with it.
        problem: String,
    },

    /// The chat template cannot be used, or does not take a conversation.
    #[error("chat template: {problem}")]
    Template {
        /// What is wrong.
        problem: String,
    },

    /// A conversation cannot be trained on.
    #[error("conversation {number}: {problem}")]
    Conversation {
        /// The conversation; the first is 1.
        number: usize,
        /// What is wrong with it.
        problem: String,
    },

    /// An argument or a setting is outside what it may be.
    #[error("`{name}` is {got}, want {want}")]
    Setting {
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

    /// candle could not do something.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    pub(crate) fn file(path: &Path, problem: impl ToString) -> Self {
        Self::File { path: path.into(), problem: problem.to_string() }
    }

    pub(crate) fn template(problem: impl ToString) -> Self {
        Self::Template { problem: problem.to_string() }
    }

    /// `Err` naming the argument or setting, unless it holds what it must.
    pub(crate) fn unless(holds: bool, name: &'static str, got: impl ToString, want: impl ToString) -> Result<()> {
        if holds { Ok(()) } else { Err(Self::setting(name, got, want)) }
    }

    pub(crate) fn setting(name: &'static str, got: impl ToString, want: impl ToString) -> Self {
        Self::Setting { name, got: got.to_string(), want: want.to_string() }
    }
}

/// For functions that return candle's errors.
impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(error) => error,
            error => Self::wrap(error),
        }
    }
}
