//! The state of a pod's proxy: its element of PROXY_STATE, behind accessors. Other CPUs and the agent change it at the same
//! time, so every field is read and written as a whole.

use intercept_common::{
    Family, Slot,
    layout::{Proxy, ProxyPort, Ring, scope},
};

use crate::{atomic, maps};

/// The proxy of a pod.
#[derive(Clone, Copy)]
pub(crate) struct ProxyState(*mut Proxy);

/// The listening sockets of one port, family and scope.
#[derive(Clone, Copy)]
pub(crate) struct ListenerRing(*mut Ring);

impl ProxyState {
    /// The proxy of the pod with this slot.
    #[inline(always)]
    pub(crate) fn of(slot: Slot) -> Option<Self> {
        maps::proxy(slot).map(Self)
    }

    /// Number of the pod's entries in ORIG_DST.
    #[inline(always)]
    pub(crate) fn connections(self) -> u64 {
        // SAFETY: an aligned word of an array element, which is never freed. The same holds for the rest of this file.
        unsafe { (&raw const (*self.0).connections).read_volatile() }
    }

    /// Adds to the number of entries.
    #[inline(always)]
    pub(crate) fn add_connections(self, more: i64) {
        // SAFETY: see `connections`.
        unsafe { atomic::fetch_add(&raw mut (*self.0).connections, more.cast_unsigned()) };
    }

    /// Whether another program has switched off callbacks.
    #[inline(always)]
    pub(crate) fn is_overruled(self) -> bool {
        // SAFETY: see `connections`.
        unsafe { (&raw const (*self.0).overruled).read_volatile() != 0 }
    }

    /// Records that another program has switched off callbacks.
    #[inline(always)]
    pub(crate) fn set_overruled(self) {
        // SAFETY: see `connections`.
        unsafe { (&raw mut (*self.0).overruled).write_volatile(1) };
    }

    /// How the listener of a port is bound, for connections of a family: one of `layout::bound`.
    #[inline(always)]
    pub(crate) fn takes(self, port: ProxyPort, family: Family) -> u16 {
        self.read(Proxy::index(port, family, scope::ANY))
    }

    /// Sets how a listener is bound.
    #[inline(always)]
    pub(crate) fn set_bound(self, port: ProxyPort, family: Family, bound: u16) {
        for (index, value) in Proxy::bind(port, family, bound, self.read(Proxy::v4_seen(port)) != 0) {
            // SAFETY: see `connections`; the array has 16.
            unsafe { (&raw mut (*self.0).bound).cast::<u16>().add(index & 15).write_volatile(value) };
        }
    }

    #[inline(always)]
    fn read(self, index: usize) -> u16 {
        // SAFETY: see `connections`; the array has 16.
        unsafe { (&raw const (*self.0).bound).cast::<u16>().add(index & 15).read_volatile() }
    }

    /// Sets whether the newest listener of a port, family and scope is an MPTCP socket.
    #[inline(always)]
    pub(crate) fn set_mptcp(self, port: ProxyPort, family: Family, scope: u8, is_mptcp: bool) {
        let bit = 1 << Proxy::index(port, family, scope);
        // SAFETY: see `connections`.
        let _before = unsafe {
            let word = &raw mut (*self.0).mptcp;
            if is_mptcp { atomic::fetch_or(word, bit) } else { atomic::fetch_and(word, !bit) }
        };
    }

    /// The slots in LISTENERS of a port, family and scope.
    #[inline(always)]
    pub(crate) fn ring(self, port: ProxyPort, family: Family, scope: u8) -> ListenerRing {
        self.ring_at(Proxy::index(port, family, scope))
    }

    /// As `ring`, by index.
    #[inline(always)]
    pub(crate) fn ring_at(self, index: usize) -> ListenerRing {
        // SAFETY: see `connections`; the array has 16.
        ListenerRing(unsafe { (&raw mut (*self.0).rings).cast::<Ring>().add(index & 15) })
    }
}

impl ListenerRing {
    /// How many slots were taken so far.
    #[inline(always)]
    pub(crate) fn top(self) -> u64 {
        // SAFETY: see `ProxyState::connections`.
        unsafe { (&raw const (*self.0).top).read_volatile() }
    }

    /// Takes the next number, whose slot is [`Ring::slot`].
    #[inline(always)]
    pub(crate) fn take(self) -> u64 {
        // SAFETY: see `ProxyState::connections`.
        unsafe { atomic::fetch_add(&raw mut (*self.0).top, 1) }
    }

    /// The slot in which the last lookup found an open socket.
    #[inline(always)]
    pub(crate) fn hint(self) -> u64 {
        // SAFETY: see `ProxyState::connections`.
        unsafe { (&raw const (*self.0).hint).read_volatile() }
    }

    /// Stores the slot in which a lookup found an open socket.
    #[inline(always)]
    pub(crate) fn set_hint(self, slot: u64) {
        // SAFETY: see `ProxyState::connections`.
        unsafe { (&raw mut (*self.0).hint).write_volatile(slot) };
    }
}
