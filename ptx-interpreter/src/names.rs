//! Names in a PTX text, and their scopes.

use std::collections::HashMap;

/// The meaning of a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Name {
    Register(u32),
    Label(u32),
    /// An offset into shared memory or into the parameters.
    Offset(u64),
}

/// The names of nested scopes. Scope 0 is the module.
pub(crate) struct Names {
    parents: Vec<usize>,
    names: HashMap<(usize, String), Name>,
}

impl Names {
    /// An empty table, for scopes with these parents.
    pub(crate) fn new(parents: Vec<usize>) -> Self {
        Self { parents, names: HashMap::new() }
    }

    /// Looks up a name in a scope and those around it.
    pub(crate) fn find(&self, mut scope: usize, name: &str) -> Option<Name> {
        loop {
            if let Some(&found) = self.names.get(&(scope, name.to_owned())) {
                return Some(found);
            }
            if scope == 0 {
                return None;
            }
            scope = self.parents[scope];
        }
    }

    pub(crate) fn add(&mut self, scope: usize, name: &str, meaning: Name) {
        self.names.insert((scope, name.to_owned()), meaning);
    }
}
