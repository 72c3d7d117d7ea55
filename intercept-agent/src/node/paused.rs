//! A node between two uses by the daemon.

use std::{cell::OnceCell, sync::Arc};

use intercept_common::names;

use super::{Living, Node, NodeError, links::SharedPrograms};
use crate::{
    maps::Maps,
    programs::{Lookup, ProgramError},
    store::{Store, Unlocked},
};

/// A [`Node`] whose store is unlocked, so that other agents can use it.
pub struct Paused {
    store: Store,
    maps: Maps,
    lookup: OnceCell<Lookup>,
    shared: SharedPrograms,
    living: Option<Arc<Living>>,
    generation: Option<u64>,
    unlocked: Option<Unlocked>,
}

impl Node {
    /// Unlocks the store and keeps what is open.
    pub fn pause(self) -> Paused {
        let generation = self.store.generation();
        let Self { store, maps, lookup, shared, living, lock } = self;
        Paused { store, maps, lookup, shared, living, generation, unlocked: lock.unlock() }
    }
}

impl Paused {
    /// Whether an attach would be quicker after [`Paused::prepare`].
    pub fn wants_preparation(&self) -> bool {
        self.lookup.get().is_none_or(Lookup::wants_spares)
    }

    /// Makes one thing ahead that the next attach needs. Nothing of the store is changed, so that it is not locked.
    pub fn prepare(&self) -> Result<(), ProgramError> {
        let lookup = match self.lookup.get() {
            Some(lookup) => lookup,
            None => {
                let lookup = Lookup::prepare(&self.store.maps())?;
                self.lookup.get_or_init(|| lookup)
            }
        };
        lookup.load_spare()
    }

    /// Locks the store again. `None` if another agent has removed what was open, or has loaded the programs of another
    /// build; the node must then be opened anew.
    pub fn resume(mut self) -> Result<Option<Node>, NodeError> {
        let lock = match self.unlocked.take() {
            Some(unlocked) => self.store.lock_again(unlocked)?,
            None => self.store.lock()?,
        };
        let same = self.generation.is_some()
            && self.store.generation() == self.generation
            && self.store.programs().join(names::CONNECT6).exists();
        let Self { store, maps, lookup, shared, living, .. } = self;
        Ok(same.then_some(Node { store, maps, lookup, shared, living, lock }))
    }
}
