//! Typed access to a node's pinned maps.

use std::{
    io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use aya::maps::{
    HashMap, IterableMap as _, MapData, MapError, MapInfo, PerCpuArray, PerCpuValues, SockHash,
    lpm_trie::{Key, LpmTrie},
};
use intercept_common::{
    Addr,
    layout::{
        ConnKey, Destination, DestinationKey, ListenerKey, MemberKey, OrigDst, PodPolicy, PortKey, Proxy,
        ReasonCounters, budget, policy,
    },
    names,
};

use crate::{
    compile::Entries,
    ids::{NetnsCookie, PolicyId, Slot},
    sys::{self, Plain, SharedArray},
};

mod lookup;
mod pinned;
mod proxy;
mod shadow;

pub use lookup::FromMaps;
pub use proxy::Registered;
pub use shadow::ShadowMaps;

use pinned::Pinned;

type Hash<K, V> = HashMap<MapData, Plain<K>, Plain<V>>;

/// The maps. Those that most commands do not need are opened when they are used first.
pub struct Maps {
    /// Policies by netns cookie.
    pub pods: HashMap<MapData, Plain<NetnsCookie>, Plain<PodPolicy>>,
    destinations: LpmTrie<MapData, Plain<DestinationKey>, Plain<Destination>>,
    ports: LpmTrie<MapData, Plain<PortKey>, Plain<u32>>,
    groups: Pinned<Hash<MemberKey, u32>>,
    interfaces: Pinned<Hash<MemberKey, u32>>,
    listeners: Pinned<SockHash<MapData, Plain<ListenerKey>>>,
    orig_dst: Pinned<Hash<ConnKey, OrigDst>>,
    proxies: SharedArray<Proxy>,
    decisions: PerCpuArray<MapData, Plain<ReasonCounters>>,
    shadow: ShadowMaps,
}

/// Key of DESTINATIONS with its prefix length.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct PrefixKey {
    prefix_len: u32,
    key: DestinationKey,
}

/// Key of PORTS with its prefix length.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct PortPrefixKey {
    prefix_len: u32,
    key: PortKey,
}

impl PrefixKey {
    /// The first key of a policy in the trie's order. It is written first and removed last, so that the others can be
    /// enumerated from it.
    fn first(policy: PolicyId) -> Self {
        Self { prefix_len: 160, key: DestinationKey { policy, addr: Addr::UNSPECIFIED } }
    }
}

impl PortPrefixKey {
    /// As [`PrefixKey::first`]. No flow has port 0.
    fn first(policy: PolicyId) -> Self {
        Self { prefix_len: PortKey::BITS, key: PortKey::new(policy, 0) }
    }
}

/// Number of a policy's entries in each map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PolicyUsage {
    /// Entries of DESTINATIONS.
    pub destinations: usize,
    /// Entries of PORTS.
    pub ports: usize,
    /// Entries of GROUPS.
    pub groups: usize,
    /// Entries of INTERFACES.
    pub interfaces: usize,
}

/// [`PolicyUsage`] by policy id.
pub type UsageOf = std::collections::HashMap<PolicyId, PolicyUsage>;

impl PolicyUsage {
    /// Returns the name of each map, its entries in use, and the budget of a pod.
    pub fn by_map(&self) -> [(&'static str, usize, u32); 4] {
        [
            (names::DESTINATIONS, self.destinations, budget::DESTINATIONS),
            (names::PORTS, self.ports, budget::PORTS),
            (names::GROUPS, self.groups, budget::GROUPS),
            (names::INTERFACES, self.interfaces, budget::INTERFACES),
        ]
    }
}

/// Use of the maps.
pub struct MapsUsage {
    /// Use by each policy.
    pub usage: UsageOf,
    /// Name, entries in use and size of each map.
    pub maps: Vec<(&'static str, usize, u32)>,
}

/// An operation on a map failed.
#[derive(Debug, thiserror::Error)]
#[error("{action} map {map}{}", self.hint())]
pub struct MapsError {
    action: &'static str,
    map: String,
    #[source]
    source: MapError,
}

impl MapsError {
    /// Whether the map is full.
    pub fn is_full(&self) -> bool {
        matches!(&self.source, MapError::SyscallError(e) if e.io_error.raw_os_error() == Some(libc::E2BIG)
            || e.io_error.raw_os_error() == Some(libc::ENOSPC))
    }

    fn hint(&self) -> &'static str {
        if self.is_full() {
            ", which is full: shorten the pod's lists of CIDRs, ports and groups, or run fewer pods on this node"
        } else {
            ""
        }
    }
}

fn failed(action: &'static str, map: &str) -> impl FnOnce(MapError) -> MapsError {
    move |source| MapsError { action, map: map.to_owned(), source }
}

fn gone_is_fine(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn is_there<T>(found: Result<T, MapError>) -> Result<bool, MapError> {
    match found {
        Ok(_) => Ok(true),
        Err(MapError::KeyNotFound) => Ok(false),
        Err(error) => Err(error),
    }
}

fn open<T: TryFrom<aya::maps::Map, Error = MapError>>(
    dir: &Path,
    name: &str,
    wrap: fn(MapData) -> aya::maps::Map,
) -> Result<T, MapsError> {
    let path: PathBuf = dir.join(name);
    let data = MapData::from_pin(&path).map_err(failed("opening", &path.display().to_string()))?;
    T::try_from(wrap(data)).map_err(failed("opening", name))
}

fn entries<K: bytemuck::Pod, V: bytemuck::Pod>(map: &MapData, name: &str) -> Result<Vec<(K, V)>, MapsError> {
    sys::entries(map.fd().as_fd()).map_err(|error| failed("reading", name)(MapError::IoError(error)))
}

impl Maps {
    /// Opens the maps from their pins in `dir`.
    pub fn open(dir: &Path) -> Result<Self, MapsError> {
        use aya::maps::Map;
        Ok(Self {
            pods: open(dir, names::POLICIES, Map::HashMap)?,
            destinations: open(dir, names::DESTINATIONS, Map::LpmTrie)?,
            ports: open(dir, names::PORTS, Map::LpmTrie)?,
            groups: Pinned::new(dir, names::GROUPS, Map::HashMap),
            interfaces: Pinned::new(dir, names::INTERFACES, Map::HashMap),
            listeners: Pinned::new(dir, names::LISTENERS, Map::SockHash),
            orig_dst: Pinned::new(dir, names::ORIG_DST, Map::HashMap),
            proxies: proxy::open(dir)?,
            decisions: open(dir, names::COUNTERS, Map::PerCpuArray)?,
            shadow: ShadowMaps::new(dir),
        })
    }

    /// Those of shadow mode.
    pub fn shadow(&self) -> &ShadowMaps {
        &self.shadow
    }

    /// Those of shadow mode, to change.
    pub fn shadow_mut(&mut self) -> &mut ShadowMaps {
        &mut self.shadow
    }

    /// Reads the active policies with their netns cookies.
    pub fn policies(&self) -> Result<Vec<(NetnsCookie, PodPolicy)>, MapsError> {
        entries(self.pods.map(), names::POLICIES)
    }

    /// Reads the policy of a namespace.
    pub fn policy(&self, cookie: NetnsCookie) -> Result<Option<PodPolicy>, MapsError> {
        match self.pods.get(&Plain(cookie), 0) {
            Ok(policy) => Ok(Some(policy.0)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(failed("reading", names::POLICIES)(error)),
        }
    }

    /// Activates a policy or replaces the active one. The replacement is atomic for connections.
    pub fn activate(&mut self, cookie: NetnsCookie, policy: &PodPolicy) -> Result<(), MapsError> {
        self.pods
            .insert(Plain(cookie), Plain(*policy), 0)
            .map_err(failed("adding a policy to", names::POLICIES))
    }

    /// Removes the policy of a namespace. Its connections are no longer captured.
    pub fn deactivate(&mut self, cookie: NetnsCookie) -> Result<(), MapsError> {
        gone_is_fine(self.pods.remove(&Plain(cookie)))
            .map_err(failed("removing a policy from", names::POLICIES))
    }

    /// Writes the entries of a policy that is not active yet. After a failure it removes them, because a part of them
    /// would use up other pods' space.
    pub fn write(&mut self, id: PolicyId, entries: &Entries) -> Result<(), MapsError> {
        let written = self.write_all(id, entries);
        if written.is_err() {
            self.remove_lists(&[(id, u32::MAX)])?;
        }
        written
    }

    fn write_all(&mut self, id: PolicyId, entries: &Entries) -> Result<(), MapsError> {
        let is_first = |(len, addr, _): &&(u32, Addr, Destination)| *len == 128 && addr.is_unspecified();
        let first = entries.destinations.iter().find(is_first);
        for (prefix_len, addr, destination) in first.into_iter().chain(&entries.destinations) {
            let key = Key::new(32 + prefix_len, Plain(DestinationKey { policy: id, addr: *addr }));
            self.destinations
                .insert(&key, Plain(*destination), 0)
                .map_err(failed("writing to", names::DESTINATIONS))?;
        }
        for prefix in &entries.ports {
            let key = Key::new(32 + prefix.len, Plain(PortKey::new(id, prefix.port)));
            self.ports.insert(&key, Plain(prefix.bits), 0).map_err(failed("writing to", names::PORTS))?;
        }
        for (map, name, members) in [
            (&mut self.groups, names::GROUPS, &entries.groups),
            (&mut self.interfaces, names::INTERFACES, &entries.interfaces),
        ] {
            for (&member, &bits) in members {
                map.get_mut()?
                    .insert(Plain(MemberKey { policy: id, member }), Plain(bits), 0)
                    .map_err(failed("writing to", name))?;
            }
        }
        Ok(())
    }

    /// Removes the entries of these policies, each with its flags, or all flags if they are not known. Entries of other pods are
    /// not read in the large maps, and in the small ones only for a policy with entries there.
    pub fn remove_lists(&mut self, policies: &[(PolicyId, u32)]) -> Result<(), MapsError> {
        for &(id, _) in policies {
            for key in self.destinations_of(id)? {
                gone_is_fine(self.destinations.remove(&Key::new(key.prefix_len, Plain(key.key))))
                    .map_err(failed("purging", names::DESTINATIONS))?;
            }
            for key in self.ports_of(id)? {
                gone_is_fine(self.ports.remove(&Key::new(key.prefix_len, Plain(key.key))))
                    .map_err(failed("purging", names::PORTS))?;
            }
        }
        for (map, name, flags) in [
            (&mut self.groups, names::GROUPS, policy::GROUPS_ONLY | policy::GROUPS_EXCEPT),
            (&mut self.interfaces, names::INTERFACES, policy::INTERFACES),
        ] {
            let has_entries = |id| policies.iter().any(|&(other, its)| other == id && its & flags != 0);
            if policies.iter().all(|&(id, _)| !has_entries(id)) {
                continue;
            }
            let map = map.get_mut()?;
            for (key, _) in entries::<MemberKey, u32>(map.map(), name)? {
                if has_entries(key.policy) {
                    gone_is_fine(map.remove(&Plain(key))).map_err(failed("purging", name))?;
                }
            }
        }
        Ok(())
    }

    /// Returns the keys of a policy in DESTINATIONS, the first one last.
    fn destinations_of(&self, id: PolicyId) -> Result<Vec<PrefixKey>, MapsError> {
        let first = PrefixKey::first(id);
        let found = self.destinations.get(&Key::new(first.prefix_len, Plain(first.key)), 0);
        if !is_there(found).map_err(failed("reading", names::DESTINATIONS))? {
            return Ok(Vec::new());
        }
        let is_its = |key: &PrefixKey| key.key.policy == id;
        let map = self.destinations.map().fd().as_fd();
        let found = sys::entries_after::<_, Destination>(map, &first, is_its)
            .map_err(|error| failed("reading", names::DESTINATIONS)(MapError::IoError(error)))?;
        Ok(found.into_iter().map(|(key, _)| key).chain([first]).collect())
    }

    /// Returns the keys of a policy in PORTS, the first one last.
    fn ports_of(&self, id: PolicyId) -> Result<Vec<PortPrefixKey>, MapsError> {
        let first = PortPrefixKey::first(id);
        let found = self.ports.get(&Key::new(first.prefix_len, Plain(first.key)), 0);
        if !is_there(found).map_err(failed("reading", names::PORTS))? {
            return Ok(Vec::new());
        }
        let is_its = |key: &PortPrefixKey| key.key.policy() == id;
        let map = self.ports.map().fd().as_fd();
        let found = sys::entries_after::<_, u32>(map, &first, is_its)
            .map_err(|error| failed("reading", names::PORTS)(MapError::IoError(error)))?;
        Ok(found.into_iter().map(|(key, _)| key).chain([first]).collect())
    }

    /// Counts each policy's entries, by policy id.
    pub fn usage(&self) -> Result<UsageOf, MapsError> {
        let mut usage = UsageOf::new();
        let reading = |name| move |error| failed("reading", name)(MapError::IoError(error));
        let fd = self.destinations.map().fd().as_fd();
        sys::for_each_batch(fd, |keys: &[PrefixKey], _: &[Destination]| {
            keys.iter().for_each(|key| usage.entry(key.key.policy).or_default().destinations += 1);
        })
        .map_err(reading(names::DESTINATIONS))?;
        sys::for_each_batch(self.ports.map().fd().as_fd(), |keys: &[PortPrefixKey], _: &[u32]| {
            keys.iter().for_each(|key| usage.entry(key.key.policy()).or_default().ports += 1);
        })
        .map_err(reading(names::PORTS))?;
        sys::for_each_batch(self.groups.get()?.map().fd().as_fd(), |keys: &[MemberKey], _: &[u32]| {
            keys.iter().for_each(|key| usage.entry(key.policy).or_default().groups += 1);
        })
        .map_err(reading(names::GROUPS))?;
        sys::for_each_batch(self.interfaces.get()?.map().fd().as_fd(), |keys: &[MemberKey], _: &[u32]| {
            keys.iter().for_each(|key| usage.entry(key.policy).or_default().interfaces += 1);
        })
        .map_err(reading(names::INTERFACES))?;
        Ok(usage)
    }

    /// Removes the connections of a namespace. Reads those of all pods.
    pub fn remove_connections(&mut self, netns: NetnsCookie) -> Result<(), MapsError> {
        for (key, _) in self.originals()? {
            if key.netns == netns {
                gone_is_fine(self.orig_dst.get_mut()?.remove(&Plain(key)))
                    .map_err(failed("removing from", names::ORIG_DST))?;
            }
        }
        Ok(())
    }

    /// The groups that a policy lists, as the programs compare them.
    pub fn groups_of(&self, policy: PolicyId) -> Result<Vec<u32>, MapsError> {
        let all = entries::<MemberKey, u32>(self.groups.get()?.map(), names::GROUPS)?;
        Ok(all.into_iter().filter(|(key, _)| key.policy == policy).map(|(key, _)| key.member).collect())
    }

    fn originals(&self) -> Result<Vec<(ConnKey, OrigDst)>, MapsError> {
        entries(self.orig_dst.get()?.map(), names::ORIG_DST)
    }

    /// Returns the use of the maps in `dir`. The number of connections is a counter of the programs, so that map is not
    /// read.
    pub fn fill(&self, dir: &Path) -> Result<MapsUsage, MapsError> {
        let policies = self.policies()?;
        let connections: u64 = policies.iter().map(|(_, policy)| self.connections(policy.slot)).sum();
        let usage = self.usage()?;
        let sum = |of: fn(&PolicyUsage) -> usize| usage.values().map(of).sum();
        let used = [
            (names::POLICIES, policies.len()),
            (names::ORIG_DST, usize::try_from(connections).unwrap_or(usize::MAX)),
            (names::DESTINATIONS, sum(|usage| usage.destinations)),
            (names::LISTENERS, self.listeners.get()?.keys().count()),
            (names::PORTS, sum(|usage| usage.ports)),
            (names::GROUPS, sum(|usage| usage.groups)),
            (names::INTERFACES, sum(|usage| usage.interfaces)),
        ];
        let with_room = used.into_iter().map(|(name, used)| {
            let info = MapInfo::from_pin(dir.join(name)).map_err(failed("reading the size of", name))?;
            Ok((name, used, info.max_entries()))
        });
        let maps = with_room.collect::<Result<_, _>>()?;
        Ok(MapsUsage { usage, maps })
    }

    /// Returns the most redirected connections of a pod: a quarter of the node's, so that three pods cannot block a
    /// fourth.
    pub fn max_connections_per_pod(&self) -> Result<u32, MapsError> {
        let info = self.orig_dst.get()?.map().info();
        let max = info.map_err(failed("reading the size of", names::ORIG_DST))?.max_entries();
        Ok((max / 4).max(1))
    }

    /// Reads the counters of a slot, summed over all CPUs.
    pub fn counters(&self, slot: Slot) -> Result<ReasonCounters, MapsError> {
        let values = self.decisions.get(&slot.0, 0).map_err(failed("reading", names::COUNTERS))?;
        let mut sum: ReasonCounters = bytemuck::Zeroable::zeroed();
        for cpu in values.iter() {
            sum.add(&cpu.0);
        }
        Ok(sum)
    }

    /// Clears the counters and the proxy's state in a slot that is given to a pod.
    pub fn reset_slot(&mut self, slot: Slot) -> Result<(), MapsError> {
        self.reset_proxy(slot);
        let cpus = aya::util::nr_cpus()
            .map_err(|(_, e)| failed("counting CPUs for", names::COUNTERS)(MapError::IoError(e)))?;
        let zero = Plain(bytemuck::Zeroable::zeroed());
        let values = PerCpuValues::try_from(vec![zero; cpus])
            .map_err(|e| failed("writing to", names::COUNTERS)(MapError::IoError(e)))?;
        self.decisions.set(slot.0, values, 0).map_err(failed("writing to", names::COUNTERS))
    }
}
