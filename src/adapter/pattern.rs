//! Regular expressions of a config, in the syntax of Python's `re`, with look-around and back-references.

use fancy_regex::{Regex, RegexBuilder};

use super::config_fields::{brief, refused};
use crate::error::Result;

/// A pattern for names of modules.
#[derive(Clone, Debug)]
pub(super) struct Pattern {
    /// The setting that holds it.
    key: String,
    regex: Regex,
}

impl Pattern {
    /// A pattern, with a prefix and a suffix that make it match as in PEFT. Its size and its number of steps are limited, so that a
    /// malicious one cannot exhaust memory or time. Errors: [`Error::File`](crate::Error::File) if it is not a regular expression.
    pub(super) fn new(key: &str, [before, pattern, after]: [&str; 3]) -> Result<Self> {
        const STEPS: usize = 100_000;
        let mut builder = RegexBuilder::new(&[before, pattern, after].concat());
        let built = builder.delegate_size_limit(1 << 20).backtrack_limit(STEPS).build();
        let wrong = |_| refused(format!("`{key}` holds {}, want a regular expression as Python's `re` reads it", brief(pattern)));
        Ok(Self { key: key.into(), regex: built.map_err(wrong)? })
    }

    /// True if it matches. False if it takes too many steps; [`check_steps`](Self::check_steps) makes that an error.
    pub(super) fn is_match(&self, name: &str) -> bool {
        self.regex.is_match(name).unwrap_or(false)
    }

    /// The text that its group of this name matched.
    pub(super) fn group<'n>(&self, name: &'n str, group: &str) -> Option<&'n str> {
        Some(self.regex.captures(name).ok()??.name(group)?.as_str())
    }

    /// Errors: [`Error::File`](crate::Error::File) if the pattern takes too many steps on this name.
    pub(super) fn check_steps(&self, name: &str) -> Result<()> {
        let gives_up = |_| refused(format!("`{}` holds a pattern that takes too many steps on `{name}`", self.key));
        self.regex.is_match(name).map(drop).map_err(gives_up)
    }
}
