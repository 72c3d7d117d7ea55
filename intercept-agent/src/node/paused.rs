//! A node between two uses by an agent that stays.

use std::cell::OnceCell;

use intercept_common::names;

use super::{Living, Node, NodeError};
use crate::{maps::Maps, programs::Lookup, store::Store};

/// A [`Node`] that others may use meanwhile.
pub struct Paused {
    store: Store,
    maps: Maps,
    lookup: OnceCell<Lookup>,
    living: Option<Living>,
    generation: Option<u64>,
}

impl Node {
    /// Unlock the store, and keep what is open for the next time.
    pub fn pause(self) -> Paused {
        let generation = self.store.generation();
        Paused { store: self.store, maps: self.maps, lookup: self.lookup, living: self.living, generation }
    }
}

impl Paused {
    /// Lock the store again. `None` when what was open is there no more: another agent took it away or put another
    /// build's programs in place, and the node is to be opened anew.
    pub fn resume(self) -> Result<Option<Node>, NodeError> {
        let lock = self.store.lock()?;
        let same = self.generation.is_some()
            && self.store.generation() == self.generation
            && self.store.programs().join(names::CONNECT6).exists();
        let Self { store, maps, lookup, living, .. } = self;
        Ok(same.then_some(Node { store, maps, lookup, living, _lock: lock }))
    }
}
