//! Opens a node: locks its store, loads the programs, and replaces those of all pods' links.

use std::{
    cell::OnceCell,
    path::{Path, PathBuf},
};

use intercept_common::names;

use super::{Node, NodeError, links::SharedPrograms};
use crate::{
    maps::Maps,
    programs::{self, Lookup, ProgramError},
    store::{Lock, Store},
    sys,
};

/// More descriptors than opening the store of a node takes, with loading the programs and a first attach. They are asked for before
/// anything is made: what is left of a load without descriptors could not be removed.
const DESCRIPTORS: u8 = 64;

impl Node {
    /// Locks the store, loads this build's programs if they are not loaded, and replaces those of all pods' links.
    /// `max_connections` is the size of ORIG_DST if it is created now.
    pub fn open(bpffs: &Path, max_connections: u32) -> Result<Self, NodeError> {
        let store = Store::open(bpffs)?;
        store
            .require_descriptors(DESCRIPTORS)
            .map_err(|source| NodeError::Descriptors { count: DESCRIPTORS, source })?;
        let lock = store.lock()?;
        if let Some(other) = store.other_layout()? {
            return Err(NodeError::OtherLayout(other.display().to_string()));
        }
        let load = !store.programs().join(names::CONNECT6).exists() || store.missing_map()?.is_some();
        if load {
            store.remove_other_layouts()?;
            // Remove partial state left by an agent that crashed.
            store.remove(&store.programs())?;
            store.create(&store.maps())?;
            store.create(&store.programs())?;
            if let Err(error) = programs::load_shared(&store.maps(), &store.programs(), max_connections) {
                // Without pods and other agents, remove everything.
                store.remove(&store.programs())?;
                if store.pods()?.is_empty() && !store.is_kept() {
                    store.remove_all()?;
                }
                return Err(error.into());
            }
            sys::give_back_memory();
        }
        let maps = Maps::open(&store.maps())?;
        let mut node = Self::with(store, maps, lock);
        let others = node.store.other_programs()?;
        if load || !others.is_empty() {
            node.replace_all_programs(&others)?;
        }
        Ok(node)
    }

    /// Replaces the programs of all pods' links with this build's, and removes those of other builds.
    fn replace_all_programs(&mut self, others: &[PathBuf]) -> Result<(), NodeError> {
        // Links of pods that are gone cannot be updated.
        self.sweep()?;
        let mut failed = false;
        for cookie in self.store.pods()? {
            if let Err(error) = self.replace_programs(cookie) {
                failed = true;
                tracing::error!(
                    cookie = cookie.0,
                    error = &error as &dyn std::error::Error,
                    "this pod keeps its old programs"
                );
            }
        }
        // Keep the old programs if one link failed, so that the next agent tries again.
        for other in others.iter().filter(|_| !failed) {
            self.store.remove(other)?;
        }
        Ok(())
    }

    /// Opens an existing store with its maps, to read or to remove.
    pub fn find(bpffs: &Path) -> Result<Option<Self>, NodeError> {
        let Some(store) = Store::find(bpffs)? else { return Ok(None) };
        let lock = store.lock()?;
        // Another agent may have removed it during the wait, or crashed before it was complete.
        if let Some(map) = store.missing_map()? {
            return if store.pods()?.is_empty() { Ok(None) } else { Err(NodeError::Incomplete(map)) };
        }
        let maps = Maps::open(&store.maps())?;
        Ok(Some(Self::with(store, maps, lock)))
    }

    fn with(store: Store, maps: Maps, lock: Lock) -> Self {
        let (lookup, shared) = (OnceCell::new(), SharedPrograms::default());
        Self { maps, lookup, shared, living: None, store, lock }
    }

    /// Prepares the `sk_lookup` program, of which each pod has an instance.
    pub(super) fn lookup(&self) -> Result<&Lookup, ProgramError> {
        if let Some(lookup) = self.lookup.get() {
            return Ok(lookup);
        }
        let lookup = Lookup::prepare(&self.store.maps())?;
        Ok(self.lookup.get_or_init(|| lookup))
    }
}
