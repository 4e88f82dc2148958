//! The layers that a config selects, by PEFT's rules.

use super::pattern::Pattern;

/// The rules that select the layers which get an update, and those which are copied and trained whole.
#[derive(Clone, Debug)]
pub(super) struct Selection {
    /// `target_modules`
    pub(super) targets: Modules,
    /// `exclude_modules`
    pub(super) excluded: Option<Modules>,
    /// `layers_to_transform` and `layers_pattern`
    pub(super) layers: Option<Layers>,
    /// `modules_to_save`
    pub(super) saved: Vec<Saved>,
}

/// A set of names.
#[derive(Clone, Debug)]
pub(super) enum Modules {
    AllLinear,
    Names(Vec<String>),
    Matching(Pattern),
}

/// Numbers of layers, such as `3` in `model.layers.3.q_proj`.
#[derive(Clone, Debug)]
pub(super) struct Layers {
    pub(super) numbers: Vec<u64>,
    /// Patterns whose group `idx` is the number of a layer; the first that matches counts.
    pub(super) patterns: Vec<Pattern>,
}

/// An entry of `modules_to_save`.
#[derive(Clone, Debug)]
pub(super) struct Saved {
    /// Layers whose names end with this are copied.
    pub(super) name: String,
    /// Matches the names of these modules and of all modules within them, which get no update.
    pub(super) within: Pattern,
}

impl Selection {
    /// True if a layer gets an update: it is a target, and neither excluded nor saved whole. `layers_to_transform` applies to layers
    /// that match the end of a name, not to one that is named in full.
    pub(super) fn targets(&self, layer: &str) -> bool {
        if self.excluded.as_ref().is_some_and(|excluded| excluded.include(layer)) {
            return false;
        }
        if self.saved.iter().any(|saved| saved.within.is_match(layer)) {
            return false;
        }
        let named = matches!(&self.targets, Modules::Names(names) if names.iter().any(|name| name == layer));
        let numbered = || self.layers.as_ref().is_none_or(|layers| layers.include(layer));
        named || self.targets.include(layer) && numbered()
    }

    /// True if a layer is copied and trained whole.
    pub(super) fn saves(&self, layer: &str) -> bool {
        self.saved.iter().any(|saved| layer.ends_with(&saved.name))
    }
}

impl Selection {
    /// All regular expressions of the selection.
    pub(super) fn patterns(&self) -> impl Iterator<Item = &Pattern> {
        let numbered = self.layers.iter().flat_map(|layers| &layers.patterns);
        let whole = std::iter::once(&self.targets).chain(&self.excluded).filter_map(Modules::pattern);
        whole.chain(numbered).chain(self.saved.iter().map(|saved| &saved.within))
    }
}

impl Modules {
    fn pattern(&self) -> Option<&Pattern> {
        match self {
            Modules::Matching(pattern) => Some(pattern),
            Modules::AllLinear | Modules::Names(_) => None,
        }
    }

    fn include(&self, layer: &str) -> bool {
        match self {
            Modules::AllLinear => true,
            Modules::Names(names) => names.iter().any(|name| {
                let above = layer.strip_suffix(name.as_str());
                above.is_some_and(|above| above.is_empty() || above.ends_with('.'))
            }),
            Modules::Matching(regex) => regex.is_match(layer),
        }
    }
}

impl Layers {
    /// True if the layer's number is in the list.
    fn include(&self, layer: &str) -> bool {
        let digits = self.patterns.iter().find_map(|pattern| pattern.group(layer, "idx"));
        digits.and_then(|digits| digits.parse().ok()).is_some_and(|number: u64| self.numbers.contains(&number))
    }
}
