//! The state of the pods' proxies: LISTENERS, and PROXY_STATE, whose words programs and agent change without a system
//! call.

use std::{
    mem::{offset_of, size_of},
    os::fd::AsFd as _,
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

use aya::maps::{Array, IterableMap as _, MapData, MapError};
use intercept_common::{
    Family,
    layout::{
        APPLICATION_LISTENERS, LISTENER_SLOTS, ListenerKey, MAX_PODS, PodPolicy, Proxy, ProxyPort, Ring,
        scope,
    },
    names,
};

use super::{Maps, MapsError, failed, gone_is_fine};
use crate::{
    ids::{NetnsCookie, Slot},
    sys::{Plain, SharedArray},
};

/// Whether a socket was registered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Registered {
    /// It receives the connections that are steered to its port.
    Yes,
    /// It is an MPTCP socket, which no map of sockets accepts.
    Mptcp,
    /// Its port has [`LISTENER_SLOTS`] open listeners: it receives no connections, the others do.
    TooMany,
}

pub(super) fn open(dir: &Path) -> Result<SharedArray<Proxy>, MapsError> {
    let map: Array<MapData, Plain<Proxy>> = super::open(dir, names::PROXY_STATE, aya::maps::Map::Array)?;
    SharedArray::map(map.map().fd().as_fd(), MAX_PODS as usize)
        .map_err(|error| failed("sharing memory with", names::PROXY_STATE)(MapError::IoError(error)))
}

impl Maps {
    /// Registers a socket that listened before the programs were attached, while the programs may register others.
    /// Selects the slot of the key.
    pub fn register_listener(
        &mut self,
        slot: Slot,
        port: ProxyPort,
        key: ListenerKey,
        socket: &impl std::os::fd::AsRawFd,
    ) -> Result<Registered, MapsError> {
        const BPF_NOEXIST: u64 = 1;
        let index = Proxy::index(port, key.family(), key.scope);
        let top = offset_of!(Proxy, rings) + index * size_of::<Ring>() + offset_of!(Ring, top);
        let (Some(top), Some(mptcp)) =
            (self.proxies.word(slot.index(), top), self.proxies.word(slot.index(), offset_of!(Proxy, mptcp)))
        else {
            return Ok(Registered::Yes);
        };
        let listeners = self.listeners.get_mut()?;
        for _ in 0..LISTENER_SLOTS {
            let key = ListenerKey { slot: Ring::slot(top.fetch_add(1, Ordering::Relaxed)), ..key };
            match listeners.insert(Plain(key), socket.as_raw_fd(), BPF_NOEXIST) {
                Ok(()) => {
                    mptcp.fetch_and(!(1 << index), Ordering::Relaxed);
                    return Ok(Registered::Yes);
                }
                Err(MapError::SyscallError(error))
                    if error.io_error.raw_os_error() == Some(libc::EOPNOTSUPP) =>
                {
                    mptcp.fetch_or(1 << index, Ordering::Relaxed);
                    return Ok(Registered::Mptcp);
                }
                // Another listener is open in this slot.
                Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::EEXIST) => {
                }
                Err(error) => return Err(failed("registering a listener in", names::LISTENERS)(error)),
            }
        }
        Ok(Registered::TooMany)
    }

    /// Registers a listening socket of a machine's application. Selects the number in the key.
    pub fn register_application(
        &mut self,
        key: ListenerKey,
        socket: &impl std::os::fd::AsRawFd,
    ) -> Result<Registered, MapsError> {
        const BPF_NOEXIST: u64 = 1;
        let listeners = self.listeners.get_mut()?;
        for number in 0..APPLICATION_LISTENERS {
            let key = ListenerKey { scope: scope::APPLICATION + number, ..key };
            let code = match listeners.insert(Plain(key), socket.as_raw_fd(), BPF_NOEXIST) {
                Ok(()) => return Ok(Registered::Yes),
                Err(MapError::SyscallError(error)) => error.io_error,
                Err(error) => return Err(failed("registering a listener in", names::LISTENERS)(error)),
            };
            match code.raw_os_error() {
                Some(libc::EEXIST) => {}
                Some(libc::EOPNOTSUPP) => return Ok(Registered::Mptcp),
                _ => {
                    let error = MapError::IoError(code);
                    return Err(failed("registering a listener in", names::LISTENERS)(error));
                }
            }
        }
        Ok(Registered::TooMany)
    }

    /// Removes the registered listeners of a namespace or workload, whose sockets may stay open.
    pub fn remove_listeners(&mut self, cookie: NetnsCookie) -> Result<(), MapsError> {
        for key in self.listeners(cookie)? {
            gone_is_fine(self.listeners.get_mut()?.remove(&Plain(key)))
                .map_err(failed("removing a listener from", names::LISTENERS))?;
        }
        Ok(())
    }

    /// Reads the registered listeners of a namespace.
    pub fn listeners(&self, cookie: NetnsCookie) -> Result<Vec<ListenerKey>, MapsError> {
        let mut found = Vec::new();
        for key in self.listeners.get()?.keys() {
            let key = key.map_err(failed("reading", names::LISTENERS))?.0;
            if key.netns == cookie {
                found.push(key);
            }
        }
        Ok(found)
    }

    /// Returns a word of the proxy's state in a slot.
    pub(super) fn proxy(&self, slot: Slot, offset: usize) -> Option<&AtomicU64> {
        self.proxies.word(slot.index(), offset)
    }

    /// Stores how the proxy's listener of a port and family is bound; `bound` is a value of `layout::bound`.
    pub fn set_bound(&self, slot: Slot, port: ProxyPort, family: Family, bound: u16) {
        let cell = |index: usize| {
            self.proxies.half_word(slot.index(), offset_of!(Proxy, bound) + index * size_of::<u16>())
        };
        let v4_seen = cell(Proxy::v4_seen(port)).is_some_and(|seen| seen.load(Ordering::Relaxed) != 0);
        for (index, value) in Proxy::bind(port, family, bound, v4_seen) {
            if let Some(cell) = cell(index) {
                cell.store(value, Ordering::Relaxed);
            }
        }
    }

    /// Clears the proxy's state in a slot that is given to a pod. No policy uses the slot yet.
    pub fn reset_proxy(&self, slot: Slot) {
        self.proxies.clear(slot.index());
    }

    /// Stores that listeners of the pod's proxy were made IP_TRANSPARENT.
    pub fn set_transparent(&self, slot: Slot) {
        if let Some(cell) = self.proxy(slot, offset_of!(Proxy, transparent)) {
            cell.store(1, Ordering::Relaxed);
        }
    }

    /// Whether listeners of the pod's proxy were made IP_TRANSPARENT.
    pub fn is_transparent(&self, slot: Slot) -> bool {
        self.proxy(slot, offset_of!(Proxy, transparent)).is_some_and(|cell| cell.load(Ordering::Relaxed) != 0)
    }

    /// Returns the number of the pod's redirected connections.
    pub fn connections(&self, slot: Slot) -> u64 {
        self.proxy(slot, offset_of!(Proxy, connections)).map_or(0, |count| count.load(Ordering::Relaxed))
    }

    /// Returns the ports and families (4 or 6) on which the pod's proxy listens with MPTCP. No map of sockets accepts
    /// these.
    pub fn mptcp_listeners(&self, policy: &PodPolicy) -> Vec<(u16, u8)> {
        let bits =
            self.proxy(policy.slot, offset_of!(Proxy, mptcp)).map_or(0, |bits| bits.load(Ordering::Relaxed));
        let mut found = Vec::new();
        for port in [policy.outbound_port, policy.inbound_port, policy.dns_port] {
            let Some(role) = policy.proxy_port(port) else { continue };
            for family in Family::ALL {
                let listener = (port, family.version());
                if bits & 1 << Proxy::index(role, family, scope::ANY) != 0 && !found.contains(&listener) {
                    found.push(listener);
                }
            }
        }
        found
    }
}
