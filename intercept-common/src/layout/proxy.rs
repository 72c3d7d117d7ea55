//! The state of a pod's proxy: its listening sockets and how they are bound.

use bytemuck::{Pod, Zeroable};

use super::{LISTENER_SLOTS, PodPolicy};
use crate::{Addr, Family, NetnsCookie};

/// Values of [`Proxy::bound`]: how the proxy's listener of a port and family is bound.
pub mod bound {
    /// No listener is known.
    pub const UNKNOWN: u16 = 0;
    /// Bound to the wildcard address: any address of the pod reaches it.
    pub const WILDCARD: u16 = 1;
    /// Bound to one address. Redirected connections dial 127.0.0.1 or ::1, as with the REDIRECT target.
    pub const ONE: u16 = 2;
    /// Bound to 127.0.0.1 or ::1 and registered in LISTENERS: sk_lookup hands it connections to
    /// [`crate::StandIn::Steered`] addresses.
    pub const STEERED: u16 = 3;
}

/// Key of LISTENERS.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Hash, Debug)]
#[repr(C)]
pub struct ListenerKey {
    /// Netns cookie.
    pub netns: NetnsCookie,
    /// Port, in host order.
    pub port: u16,
    /// Family of the socket, 4 or 6. An IPv6 socket may accept IPv4 as well.
    pub family: u8,
    /// One of [`scope`].
    pub scope: u8,
    /// Sockets of one port are numbered in the order in which they start to listen; see [`Ring`].
    pub slot: u32,
}

impl ListenerKey {
    /// The family of the socket.
    #[inline(always)]
    pub const fn family(&self) -> Family {
        if self.family == Family::V6.version() { Family::V6 } else { Family::V4 }
    }
}

/// Values of [`ListenerKey::scope`].
pub mod scope {
    /// Accepts connections from outside.
    pub const ANY: u8 = 0;
    /// Bound to 127.0.0.1 or ::1: accepts connections from the pod itself only.
    pub const LOCALHOST: u8 = 1;
    /// The first of [`super::APPLICATION_LISTENERS`] scopes of a machine's applications; see
    /// [`super::ListenerKey::application`].
    pub const APPLICATION: u8 = 2;
}

/// Most listening sockets of an application that share an address and a port (SO_REUSEPORT) and are known. If these are
/// closed while a further one stays open, its connections are not captured.
pub const APPLICATION_LISTENERS: u8 = 8;

impl ListenerKey {
    /// The key of the listening socket `number` of a machine's application that is bound to this address. Its slot is the
    /// address, or a hash of an IPv6 one: the programs compare the address of the socket as well.
    #[inline(always)]
    pub fn application(netns: NetnsCookie, port: u16, bound: Addr, number: u8) -> Self {
        let words = bound.words();
        let (family, slot) = if bound.is_v4() {
            (Family::V4.version(), bound.v4())
        } else {
            (Family::V6.version(), words[0] ^ words[1] ^ words[2] ^ words[3])
        };
        Self { netns, port, family, scope: scope::APPLICATION + number, slot }
    }

    /// Whether the socket is an application's rather than the proxy's.
    #[inline(always)]
    pub const fn is_application(&self) -> bool {
        self.scope >= scope::APPLICATION
    }
}

/// Value of PROXY_STATE: the state of a pod's proxy and connections.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Proxy {
    /// Number of the pod's entries in ORIG_DST.
    pub connections: u64,
    /// 1 once another program has switched off the callbacks that delete entries of ORIG_DST
    /// ([`crate::names::RELEASES`]).
    pub overruled: u64,
    /// A bit for each [`Proxy::index`] whose newest listener is an MPTCP socket and cannot be registered.
    pub mptcp: u64,
    /// 1 once the agent has set IP_TRANSPARENT on listeners of the outbound port, for `-k`.
    pub transparent: u64,
    /// How connections of a family reach the proxy: one of [`bound`], indexed by [`Proxy::index`] with [`scope::ANY`].
    /// Written according to [`Proxy::bind`].
    pub bound: [u16; 16],
    /// Slots in LISTENERS of a port, family and scope, indexed by [`Proxy::index`].
    pub rings: [Ring; 16],
}

/// A port of the proxy, by its role.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ProxyPort {
    /// [`PodPolicy::outbound_port`]; wins if other ports have the same number.
    Outbound = 0,
    /// [`PodPolicy::inbound_port`].
    Inbound = 1,
    /// [`PodPolicy::dns_port`], for DNS over TCP.
    Dns = 2,
}

/// The listening sockets of one port, family and scope in LISTENERS. A new listener takes the slot of the newest one if
/// that is closed, else the next slot.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Ring {
    /// How many slots were taken so far. The newest listener has the slot [`Ring::slot`] of one less.
    pub top: u64,
    /// Slot in which the last lookup found an open socket.
    pub hint: u64,
}

impl Ring {
    /// The slot of the listener that was counted with this number.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "less than the number of slots")]
    pub const fn slot(number: u64) -> u32 {
        (number % LISTENER_SLOTS as u64) as u32
    }
}

impl ProxyPort {
    /// The port with this discriminant; [`ProxyPort::Dns`] for any other than the first two.
    #[inline(always)]
    pub const fn of(number: u16) -> Self {
        match number {
            0 => Self::Outbound,
            1 => Self::Inbound,
            _ => Self::Dns,
        }
    }
}

impl PodPolicy {
    /// The roles of this port number: several if options give two roles the same port.
    #[inline(always)]
    pub const fn proxy_ports(&self, port: u16) -> [Option<ProxyPort>; 3] {
        [
            if port == self.outbound_port { Some(ProxyPort::Outbound) } else { None },
            if port == self.inbound_port { Some(ProxyPort::Inbound) } else { None },
            if port == self.dns_port { Some(ProxyPort::Dns) } else { None },
        ]
    }

    /// The role of this port number, the first if there are several.
    #[inline(always)]
    pub const fn proxy_port(&self, port: u16) -> Option<ProxyPort> {
        if port == self.outbound_port {
            Some(ProxyPort::Outbound)
        } else if port == self.inbound_port {
            Some(ProxyPort::Inbound)
        } else if port == self.dns_port {
            Some(ProxyPort::Dns)
        } else {
            None
        }
    }
}

impl Proxy {
    /// The part of an index that means IPv6.
    pub const V6: usize = 2;

    /// Index into [`Proxy::bound`] and [`Proxy::rings`].
    #[inline(always)]
    pub const fn index(port: ProxyPort, family: Family, scope: u8) -> usize {
        (port as usize) << 2 | family as usize & Self::V6 | scope as usize & 1
    }

    /// What a new listener changes in [`Proxy::bound`], as pairs of index and value. An IPv6 listener on the wildcard
    /// address accepts IPv4 as well, unless an IPv4 listener was seen, which is noted at the index of the other scope.
    #[inline(always)]
    pub const fn bind(port: ProxyPort, family: Family, bound: u16, v4_seen: bool) -> [(usize, u16); 2] {
        let own = (Self::index(port, family, scope::ANY), bound);
        if matches!(family, Family::V4) {
            return [own, (Self::v4_seen(port), 1)];
        }
        if v4_seen {
            return [own, own];
        }
        let for_v4 = if bound == bound::WILDCARD { bound } else { bound::UNKNOWN };
        [own, (Self::index(port, Family::V4, scope::ANY), for_v4)]
    }

    /// Index into [`Proxy::bound`] of whether an IPv4 listener was seen.
    #[inline(always)]
    pub const fn v4_seen(port: ProxyPort) -> usize {
        Self::index(port, Family::V4, scope::LOCALHOST)
    }
}

const _: () = {
    assert!(size_of::<ListenerKey>() == 16);
    assert!(size_of::<Proxy>() == 32 + 32 + 256);
};
