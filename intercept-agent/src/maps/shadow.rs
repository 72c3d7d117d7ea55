//! The maps of shadow mode: counts of agreement, and the kinds of differences.

use std::{os::fd::AsFd as _, path::Path};

use aya::maps::{Array, IterableMap as _, MapData, MapError};
use intercept_common::{
    layout::{
        ComparedFlow, DifferenceKey, RememberedFlow, SHADOW_CONNS, SHADOW_DIALS, ShadowCounters, ShadowKey,
        ShadowSet, ShadowSocket,
    },
    names,
};

use super::{Hash, MapsError, Pinned, failed, gone_is_fine};
use crate::{
    ids::NetnsCookie,
    sys::{self, Plain, SharedArray},
};

/// The maps, each opened when it is used first.
pub struct ShadowMaps {
    counters: Pinned<Hash<NetnsCookie, ShadowCounters>>,
    kinds: Pinned<Hash<DifferenceKey, ComparedFlow>>,
    flows: Pinned<Hash<ShadowKey, RememberedFlow>>,
    conns: Pinned<Array<MapData, Plain<ShadowSet>>>,
    dials: Pinned<Array<MapData, Plain<ShadowSocket>>>,
    switch: Pinned<Array<MapData, u32>>,
}

impl ShadowMaps {
    pub(super) fn new(dir: &Path) -> Self {
        use aya::maps::Map;
        Self {
            counters: Pinned::new(dir, names::SHADOW_COUNTERS, Map::HashMap),
            kinds: Pinned::new(dir, names::SHADOW_KINDS, Map::HashMap),
            flows: Pinned::new(dir, names::SHADOW_FLOWS, Map::LruHashMap),
            conns: Pinned::new(dir, names::SHADOW_CONNS, Map::Array),
            dials: Pinned::new(dir, names::SHADOW_DIALS, Map::Array),
            switch: Pinned::new(dir, names::SHADOWING, Map::Array),
        }
    }

    /// Starts counting for a pod. What was counted before is forgotten. `now` is in seconds since 1970.
    pub fn begin(&mut self, cookie: NetnsCookie, now: u64) -> Result<(), MapsError> {
        self.end(cookie)?;
        let counters = ShadowCounters { since: now, ..bytemuck::Zeroable::zeroed() };
        self.counters
            .get_mut()?
            .insert(Plain(cookie), Plain(counters), 0)
            .map_err(failed("writing to", names::SHADOW_COUNTERS))
    }

    /// Forgets what was counted for a pod.
    pub fn end(&mut self, cookie: NetnsCookie) -> Result<(), MapsError> {
        gone_is_fine(self.counters.get_mut()?.remove(&Plain(cookie)))
            .map_err(failed("purging", names::SHADOW_COUNTERS))?;
        for (key, _) in self.differences(cookie)? {
            gone_is_fine(self.kinds.get_mut()?.remove(&Plain(key)))
                .map_err(failed("purging", names::SHADOW_KINDS))?;
        }
        Ok(())
    }

    /// Switches the programs' part on before the first pod is in shadow mode.
    pub fn switch_on(&mut self) -> Result<(), MapsError> {
        self.switch.get_mut()?.set(0, 1, 0).map_err(failed("writing to", names::SHADOWING))
    }

    /// Switches the programs' part off after the last pod has left shadow mode, and forgets what they remember.
    pub fn switch_off(&mut self) -> Result<(), MapsError> {
        self.switch.get_mut()?.set(0, 0, 0).map_err(failed("writing to", names::SHADOWING))?;
        clear(self.conns.get()?, SHADOW_CONNS as usize, names::SHADOW_CONNS)?;
        clear(self.dials.get()?, SHADOW_DIALS as usize, names::SHADOW_DIALS)?;
        for (key, _) in
            super::entries::<ShadowKey, RememberedFlow>(self.flows.get()?.map(), names::SHADOW_FLOWS)?
        {
            gone_is_fine(self.flows.get_mut()?.remove(&Plain(key)))
                .map_err(failed("purging", names::SHADOW_FLOWS))?;
        }
        Ok(())
    }

    /// The counts of a pod. `None` if it is not in shadow mode.
    pub fn counters(&self, cookie: NetnsCookie) -> Result<Option<ShadowCounters>, MapsError> {
        match self.counters.get()?.get(&Plain(cookie), 0) {
            Ok(counters) => Ok(Some(counters.0)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(failed("reading", names::SHADOW_COUNTERS)(error)),
        }
    }

    /// The counts of all pods in shadow mode.
    pub fn all_counters(&self) -> Result<Vec<(NetnsCookie, ShadowCounters)>, MapsError> {
        super::entries(self.counters.get()?.map(), names::SHADOW_COUNTERS)
    }

    /// The examples of a pod's differences.
    pub fn differences(&self, cookie: NetnsCookie) -> Result<Vec<(DifferenceKey, ComparedFlow)>, MapsError> {
        let mut all = self.all_differences()?;
        all.retain(|(key, _)| key.netns == cookie);
        Ok(all)
    }

    /// The examples of all pods' differences, in the order of their keys: the last of a kind comes after the first.
    pub fn all_differences(&self) -> Result<Vec<(DifferenceKey, ComparedFlow)>, MapsError> {
        let mut all: Vec<(DifferenceKey, ComparedFlow)> = sys::entries(self.kinds.get()?.map().fd().as_fd())
            .map_err(|error| failed("reading", names::SHADOW_KINDS)(MapError::IoError(error)))?;
        all.sort_by_key(|(key, _)| *key);
        Ok(all)
    }
}

/// Sets every value of an array to zero.
fn clear<T: bytemuck::Pod>(
    array: &Array<MapData, Plain<T>>,
    len: usize,
    name: &'static str,
) -> Result<(), MapsError> {
    let shared = SharedArray::<T>::map(array.map().fd().as_fd(), len)
        .map_err(|error| failed("sharing memory with", name)(MapError::IoError(error)))?;
    (0..len).for_each(|index| shared.clear(index));
    Ok(())
}
