//! The regular expressions of a config, as Python's `re` reads them: with look-around and back-references.

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
    /// A pattern between what makes it match as PEFT does. Errors: [`Error::File`](crate::Error::File) for what is no regular
    /// expression. The limits keep a hostile one small and short.
    pub(super) fn new(key: &str, [before, pattern, after]: [&str; 3]) -> Result<Self> {
        const STEPS: usize = 100_000;
        let mut builder = RegexBuilder::new(&[before, pattern, after].concat());
        let built = builder.delegate_size_limit(1 << 20).backtrack_limit(STEPS).build();
        let wrong = |_| refused(format!("`{key}` holds {}, want a regular expression as Python's `re` reads it", brief(pattern)));
        Ok(Self { key: key.into(), regex: built.map_err(wrong)? })
    }

    /// Whether it matches. A pattern that gives up does not: see [`decides`](Self::decides).
    pub(super) fn is_match(&self, name: &str) -> bool {
        self.regex.is_match(name).unwrap_or(false)
    }

    /// What its group of this name matched.
    pub(super) fn group<'n>(&self, name: &'n str, group: &str) -> Option<&'n str> {
        Some(self.regex.captures(name).ok()??.name(group)?.as_str())
    }

    /// Errors: [`Error::File`](crate::Error::File) if the pattern takes more steps on this name than anybody should wait for.
    pub(super) fn decides(&self, name: &str) -> Result<()> {
        let gives_up = |_| refused(format!("`{}` holds a pattern that takes too many steps on `{name}`", self.key));
        self.regex.is_match(name).map(drop).map_err(gives_up)
    }
}
