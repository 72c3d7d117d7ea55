//! What is known of a pod's proxy: its listening sockets, and how they are bound.

use bytemuck::{Pod, Zeroable};

use super::PodPolicy;

/// Values of [`Proxy::bound`]: how the proxy's listener of a port and family is bound.
pub mod bound {
    /// No such socket has been seen to listen.
    pub const UNKNOWN: u16 = 0;
    /// To the wildcard address: any address of the pod reaches it.
    pub const WILDCARD: u16 = 1;
    /// To one address. Redirected connections dial 127.0.0.1 or ::1, as under a REDIRECT.
    pub const ONE: u16 = 2;
    /// To 127.0.0.1 or ::1, and registered in LISTENERS: sk_lookup hands it what dials [`crate::StandIn::Steered`].
    pub const STEERED: u16 = 3;
}

/// Key of LISTENERS.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Hash, Debug)]
#[repr(C)]
pub struct ListenerKey {
    /// Netns cookie.
    pub netns: u64,
    /// Port it listens on.
    pub port: u16,
    /// 4 or 6: the family of the socket; one of 6 may take IPv4 as well.
    pub family: u8,
    /// One of [`scope`].
    pub scope: u8,
    /// Sockets of one port are numbered as they come; see [`Ring`].
    pub slot: u32,
}

/// Values of [`ListenerKey::scope`].
pub mod scope {
    /// Takes connections from outside.
    pub const ANY: u8 = 0;
    /// Bound to 127.0.0.1 or ::1: takes connections of the pod itself only.
    pub const LOCALHOST: u8 = 1;
}

/// Value of PROXY_STATE: what is known of a pod's proxy and connections while they run.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Proxy {
    /// Entries of ORIG_DST.
    pub connections: u64,
    /// 1 once another program was seen to switch off the callbacks that end an entry of ORIG_DST ([`crate::names::RELEASES`]).
    pub overruled: u64,
    /// A bit for each [`Proxy::index`] whose last listener could not be registered because it is of MPTCP.
    pub mptcp: u64,
    /// 1 once the agent made listeners of the outbound port IP_TRANSPARENT, for the guests of `-k`.
    pub transparent: u64,
    /// How connections of a family find the proxy: by [`Proxy::index`] with [`scope::ANY`] one of [`bound`], written whole by
    /// [`Proxy::bind`].
    pub bound: [u16; 16],
    /// By [`Proxy::index`]: where LISTENERS has the sockets of a port, family and scope.
    pub rings: [Ring; 16],
}

/// Which of the proxy's ports, as an index.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ProxyPort {
    /// [`PodPolicy::outbound_port`], also where others have the same number.
    Outbound = 0,
    /// [`PodPolicy::inbound_port`].
    Inbound = 1,
    /// [`PodPolicy::dns_port`], of TCP.
    Dns = 2,
}

/// The listening sockets of one port, family and scope in LISTENERS. A socket that begins to listen takes the slot of
/// the newest if that one is closed, else the next one.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Ring {
    /// One above the highest slot that was ever taken.
    pub top: u64,
    /// Where the last connection found a socket.
    pub hint: u64,
}

impl ProxyPort {
    /// By its number; [`ProxyPort::Dns`] for any other than those of the first two.
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
    /// The ports that have this number: more than one if options name the same twice.
    #[inline(always)]
    pub const fn proxy_ports(&self, port: u16) -> [Option<ProxyPort>; 3] {
        [
            if port == self.outbound_port { Some(ProxyPort::Outbound) } else { None },
            if port == self.inbound_port { Some(ProxyPort::Inbound) } else { None },
            if port == self.dns_port { Some(ProxyPort::Dns) } else { None },
        ]
    }

    /// Which port of the proxy this is.
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
    /// What IPv6 adds to an index.
    pub const V6: usize = 2;

    /// Index into [`Proxy::bound`] and [`Proxy::rings`].
    #[inline(always)]
    pub const fn index(port: ProxyPort, v6: bool, scope: u8) -> usize {
        (port as usize) << 2 | (v6 as usize) << 1 | scope as usize & 1
    }

    /// What a listener of a port changes in [`Proxy::bound`]: indices and values. One of IPv6 on the wildcard
    /// address takes IPv4 as well, unless one of IPv4 was seen, which is noted at the index of the other scope.
    #[inline(always)]
    pub const fn bind(port: ProxyPort, v6: bool, bound: u16, v4_seen: bool) -> [(usize, u16); 2] {
        let own = (Self::index(port, v6, scope::ANY), bound);
        if !v6 {
            return [own, (Self::v4_seen(port), 1)];
        }
        if v4_seen {
            return [own, own];
        }
        let for_v4 = if bound == bound::WILDCARD { bound } else { bound::UNKNOWN };
        [own, (Self::index(port, false, scope::ANY), for_v4)]
    }

    /// Index into [`Proxy::bound`] of whether a listener of IPv4 was seen.
    #[inline(always)]
    pub const fn v4_seen(port: ProxyPort) -> usize {
        Self::index(port, false, scope::LOCALHOST)
    }
}

const _: () = {
    assert!(size_of::<ListenerKey>() == 16);
    assert!(size_of::<Proxy>() == 32 + 32 + 256);
};
