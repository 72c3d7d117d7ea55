//! Opening a node: lock its store, load its programs, and put them under the links of all pods.

use std::{
    cell::OnceCell,
    path::{Path, PathBuf},
};

use intercept_common::names;

use super::{Node, NodeError};
use crate::{
    maps::Maps,
    programs::{self, Lookup, ProgramError},
    store::Store,
    sys,
};

impl Node {
    /// Lock the store; load the programs if this build's are not there, and put them under the links of all pods.
    /// `max_connections` is the size of ORIG_DST if it is made now.
    pub fn open(bpffs: &Path, max_connections: u32) -> Result<Self, NodeError> {
        let store = Store::open(bpffs)?;
        let lock = store.lock()?;
        if let Some(other) = store.other_layout()? {
            return Err(NodeError::OtherLayout(other.display().to_string()));
        }
        let load = !store.programs().join(names::CONNECT6).exists() || store.missing_map().is_some();
        if load {
            store.remove_other_layouts()?;
            // What an agent left that died on the way is in the way.
            store.remove(&store.programs())?;
            store.create(&store.maps())?;
            store.create(&store.programs())?;
            if let Err(error) = programs::load_shared(&store.maps(), &store.programs(), max_connections) {
                // Of a node without pods and other agents nothing is left.
                store.remove(&store.programs())?;
                if store.pods()?.is_empty() && !store.is_kept() {
                    store.remove_all()?;
                }
                return Err(error.into());
            }
            sys::give_back_memory();
        }
        let maps = Maps::open(&store.maps())?;
        let mut node = Self { maps, lookup: OnceCell::new(), living: None, store, _lock: lock };
        let others = node.store.other_programs()?;
        if load || !others.is_empty() {
            node.replace_all_programs(&others)?;
        }
        Ok(node)
    }

    /// Put this build's programs under the links of all pods, and remove those of other builds.
    fn replace_all_programs(&mut self, others: &[PathBuf]) -> Result<(), NodeError> {
        // The links of pods that are gone take no other program.
        self.sweep()?;
        let mut failed = false;
        for cookie in self.store.pods()? {
            if let Err(error) = self.replace_programs(cookie) {
                failed = true;
                tracing::error!(
                    cookie = cookie.0,
                    error = &error as &dyn std::error::Error,
                    "this pod keeps the programs that it has"
                );
            }
        }
        // Kept where one failed, so that the next agent tries it again.
        for other in others.iter().filter(|_| !failed) {
            self.store.remove(other)?;
        }
        Ok(())
    }

    /// The store and maps if there are any: for those who only look, and for those who take away.
    pub fn find(bpffs: &Path) -> Result<Option<Self>, NodeError> {
        let Some(store) = Store::find(bpffs) else { return Ok(None) };
        let lock = store.lock()?;
        // Another agent may have taken it away while we waited, or have died before all of it was there.
        if let Some(map) = store.missing_map() {
            return if store.pods()?.is_empty() { Ok(None) } else { Err(NodeError::Incomplete(map)) };
        }
        let maps = Maps::open(&store.maps())?;
        Ok(Some(Self { maps, lookup: OnceCell::new(), living: None, store, _lock: lock }))
    }

    /// What all instances of the `sk_lookup` program are made of.
    pub(super) fn lookup(&self) -> Result<&Lookup, ProgramError> {
        if let Some(lookup) = self.lookup.get() {
            return Ok(lookup);
        }
        let lookup = Lookup::prepare(&self.store.maps())?;
        Ok(self.lookup.get_or_init(|| lookup))
    }
}
