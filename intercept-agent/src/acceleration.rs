//! Joins connections between proxies of captured pods on this node, so that messages bypass TCP. The programs and maps
//! are an object of their own, loaded for the first pod with `--accelerate`.
//!
//! The programs pair the ends and decide for each message (`intercept-ebpf/src/join`). This module decides which pods
//! take part: a pod's cell in JOIN_PODS is its switch and JOIN_OFF the node's. Both take effect with the next message.

mod proxies;
pub mod self_test;

use std::{io, os::fd::AsFd as _, path::Path};

use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, SkStorage};
use aya_obj::generated::bpf_attach_type;
use intercept_common::{
    Slot,
    acceleration::{
        JOIN_COUNTER_COUNT, JoinCount, JoinCounters, JoinOffer, JoinSocket, PodCell, ProxyName, RDONLY_CAST,
        SequenceKey, TcpReason,
    },
    names,
};

use crate::{
    btf_offsets::{self, OffsetError},
    loader::{LoadError, LoadOptions, Loaded},
    objects::JOIN,
    options::Config,
    programs,
    store::Store,
    sys::{self, Plain},
};

pub use proxies::Owners;

/// Why connections of a pod, or of the whole node, are not joined.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AccelerationError {
    /// The kernel has failed the self-test.
    #[error(transparent)]
    Gate(#[from] self_test::Refused),
    /// The offsets that the programs need are unknown.
    #[error("looking up the offsets for the programs that join connections")]
    Offsets(#[from] OffsetError),
    /// The maps cannot be created, or the kernel refused a program.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// An operation on a program, a link or a pin failed.
    #[error("{action} {name}")]
    Call {
        /// The operation.
        action: &'static str,
        /// Name of the object.
        name: &'static str,
        /// The error from the kernel.
        #[source]
        source: io::Error,
    },
    /// An operation on a map failed.
    #[error("{action} map {name}")]
    Map {
        /// The operation.
        action: &'static str,
        /// Name of the map.
        name: &'static str,
        /// The error from aya.
        #[source]
        source: Box<MapError>,
    },
}

fn map_failed(action: &'static str, name: &'static str) -> impl FnOnce(MapError) -> AccelerationError {
    move |source| AccelerationError::Map { action, name, source: Box::new(source) }
}

fn call_failed(action: &'static str, name: &'static str) -> impl FnOnce(io::Error) -> AccelerationError {
    move |source| AccelerationError::Call { action, name, source }
}

/// The counters of a pod that are not zero, with their names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Counters of [`JoinCount`].
    pub connections: Vec<(&'static str, u64)>,
    /// Counters of [`TcpReason`]: joined connections that changed to TCP, by reason.
    pub back_to_tcp: Vec<(&'static str, u64)>,
}

/// The maps of joined connections, opened from their pins.
pub struct Acceleration {
    pods: Array<MapData, u64>,
    proxies: HashMap<MapData, Plain<ProxyName>, u32>,
    offers: HashMap<MapData, Plain<SequenceKey>, Plain<JoinOffer>>,
    off: Array<MapData, u32>,
    counters: PerCpuArray<MapData, Plain<JoinCounters>>,
    sockets: SkStorage<MapData, Plain<JoinSocket>>,
}

fn open<T: TryFrom<Map, Error = MapError>>(
    maps: &Path,
    name: &'static str,
    wrap: fn(MapData) -> Map,
) -> Result<T, AccelerationError> {
    let data = MapData::from_pin(maps.join(name)).map_err(map_failed("opening", name))?;
    T::try_from(wrap(data)).map_err(map_failed("opening", name))
}

impl Acceleration {
    /// Opens the node's maps. `None` if no pod has used them since boot, with any build of the agent.
    pub fn find(store: &Store) -> Result<Option<Self>, AccelerationError> {
        // This map is pinned last.
        if store.maps().join(names::JOIN_COUNTERS).exists() { Self::open(store).map(Some) } else { Ok(None) }
    }

    fn open(store: &Store) -> Result<Self, AccelerationError> {
        let maps = store.maps();
        Ok(Self {
            pods: open(&maps, names::JOIN_PODS, Map::Array)?,
            proxies: open(&maps, names::JOIN_PROXIES, Map::HashMap)?,
            offers: open(&maps, names::JOIN_OFFERS, Map::HashMap)?,
            off: open(&maps, names::JOIN_OFF, Map::Array)?,
            counters: open(&maps, names::JOIN_COUNTERS, Map::PerCpuArray)?,
            sockets: open(&maps, names::JOIN_SOCKETS, Map::SkStorage)?,
        })
    }

    /// Whether this build's programs are loaded.
    pub fn is_loaded(store: &Store) -> bool {
        store.programs().join(names::JOIN_OPS).exists()
    }

    /// Loads this build's programs unless they are loaded.
    ///
    /// # Errors
    /// [`AccelerationError::Refused`] if the kernel fails the self-test.
    pub fn load(store: &Store) -> Result<Self, AccelerationError> {
        if !Self::is_loaded(store) {
            self_test::admit()?;
            load_programs(&store.maps(), &store.programs())?;
            sys::give_back_memory();
        }
        Self::open(store)
    }

    /// Allows connections of a pod's accepted executables to be joined.
    pub fn allow(&mut self, pod: PodCell, config: &Config) -> Result<(), AccelerationError> {
        let allowed = config.accelerate.iter().filter_map(|name| ProxyName::new(pod.netns, name));
        let allowed: Vec<_> = allowed.collect();
        for name in &allowed {
            self.proxies
                .insert(Plain(*name), 1, 0)
                .map_err(map_failed("adding a proxy to", names::JOIN_PROXIES))?;
        }
        self.forget_proxies(|name| name.netns == pod.netns && !allowed.contains(name))?;
        if self.is_on(pod) {
            return Ok(());
        }
        self.reset_counters(pod.slot)?;
        self.pods
            .set(pod.slot.0, pod.netns.0, 0)
            .map_err(map_failed("switching on a pod in", names::JOIN_PODS))
    }

    /// Stops joining a pod's messages, from the next one on. Its joined connections continue by TCP.
    pub fn revoke(&mut self, pod: PodCell) -> Result<(), AccelerationError> {
        if self.is_on(pod) {
            self.pods
                .set(pod.slot.0, 0, 0)
                .map_err(map_failed("switching off a pod in", names::JOIN_PODS))?;
        }
        self.forget_proxies(|name| name.netns == pod.netns)
    }

    /// Removes the offers of a pod's connections. Their sockets do so when they close, but only while the pod's link exists.
    pub fn withdraw_offers(&mut self, pod: PodCell) -> Result<(), AccelerationError> {
        let keys: Vec<_> = self
            .offers
            .iter()
            .filter_map(Result::ok)
            .filter(|(_, offer)| offer.0.dialled.pod.netns == pod.netns)
            .map(|(key, _)| key)
            .collect();
        for key in keys {
            match self.offers.remove(&key) {
                Ok(()) | Err(MapError::KeyNotFound) => {}
                Err(error) => return Err(map_failed("removing an offer from", names::JOIN_OFFERS)(error)),
            }
        }
        Ok(())
    }

    /// Whether joining is switched on for this pod. The node's switch is separate.
    pub fn is_on(&self, pod: PodCell) -> bool {
        self.pods.get(&pod.slot.0, 0).is_ok_and(|netns| netns == pod.netns.0)
    }

    /// Whether joining is switched on for this node.
    pub fn node_is_on(&self) -> Result<bool, AccelerationError> {
        let off = self.off.get(&0, 0).map_err(map_failed("reading", names::JOIN_OFF))?;
        Ok(off == 0)
    }

    /// Switches joining off for this node, from the next message on.
    pub fn deactivate(&mut self) -> Result<(), AccelerationError> {
        self.off.set(0, 1, 0).map_err(map_failed("switching off this node in", names::JOIN_OFF))
    }

    /// Switches joining on for this node.
    pub fn activate(&mut self) -> Result<(), AccelerationError> {
        self.off.set(0, 0, 0).map_err(map_failed("switching on this node in", names::JOIN_OFF))
    }

    /// Reads the counters of a pod.
    pub fn counted(&self, pod: PodCell) -> Result<Counted, AccelerationError> {
        let cpus = self.counters.get(&pod.slot.0, 0).map_err(map_failed("reading", names::JOIN_COUNTERS))?;
        let mut sum = [0; JOIN_COUNTER_COUNT];
        for cpu in cpus.iter() {
            sum.iter_mut().zip(cpu.0.counts).for_each(|(total, count)| *total += count);
        }
        let (connections, passes) = sum.split_at(JoinCount::ALL.len());
        let named = |words: Vec<&'static str>, counts: &[u64]| {
            words.into_iter().zip(counts.iter().copied()).filter(|(_, count)| *count > 0).collect()
        };
        Ok(Counted {
            connections: named(JoinCount::ALL.iter().map(|count| count.as_str()).collect(), connections),
            back_to_tcp: named(TcpReason::ALL.iter().map(|pass| pass.as_str()).collect(), passes),
        })
    }

    fn reset_counters(&mut self, slot: Slot) -> Result<(), AccelerationError> {
        let failed = map_failed("writing to", names::JOIN_COUNTERS);
        let mut zero = || {
            let cpus = aya::util::nr_cpus().map_err(|(_, error)| MapError::IoError(error))?;
            let zero = Plain(JoinCounters { counts: [0; JOIN_COUNTER_COUNT] });
            let zeros = aya::maps::PerCpuValues::try_from(vec![zero; cpus]).map_err(MapError::IoError)?;
            self.counters.set(slot.0, zeros, 0)
        };
        zero().map_err(failed)
    }

    fn forget_proxies(&mut self, is_old: impl Fn(&ProxyName) -> bool) -> Result<(), AccelerationError> {
        let names: Vec<_> =
            self.proxies.keys().filter_map(Result::ok).filter(|name| is_old(&name.0)).collect();
        for name in names {
            match self.proxies.remove(&name) {
                Ok(()) | Err(MapError::KeyNotFound) => {}
                Err(error) => return Err(map_failed("removing a proxy from", names::JOIN_PROXIES)(error)),
            }
        }
        Ok(())
    }
}

/// Maps of the other object that these programs use.
const SHARED_MAPS: [&str; 3] = [names::POLICIES, names::EVENTS, names::TRACING];

/// Loads the programs with the maps pinned in `maps`, which are created if they are missing, and pins them in
/// `directory`. The sk_msg program is attached to JOIN_ENDS.
fn load_programs(maps: &Path, directory: &Path) -> Result<(), AccelerationError> {
    let types = btf_offsets::find_for_joining()?;
    let constants: Vec<_> =
        types.offsets.iter().map(|(name, value)| (*name, bytemuck::bytes_of(value))).collect();
    let pinned: Vec<_> = names::JOIN_MAPS.iter().chain(&SHARED_MAPS).copied().collect();
    let options = LoadOptions { pins: maps, pinned: &pinned, constants: &constants, sizes: &[] };
    let mut object = Loaded::new(JOIN, options)?;
    object.replace_helper(RDONLY_CAST, types.cast);
    // JOIN_OPS is pinned last, so that its pin shows that everything is loaded.
    for name in [names::JOIN_MSG, names::JOIN_OPS] {
        let program = object.load(name, programs::kind(name))?;
        if name == names::JOIN_MSG {
            let ends = object.map(names::JOIN_ENDS)?;
            sys::attach_to_map(program.as_fd(), ends, bpf_attach_type::BPF_SK_MSG_VERDICT)
                .map_err(call_failed("attaching to JOIN_ENDS program", name))?;
        }
        sys::pin(program.as_fd(), &directory.join(name)).map_err(call_failed("pinning program", name))?;
    }
    Ok(())
}
