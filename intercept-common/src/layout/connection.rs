//! The state of redirected connections, sockets and handshakes.

use bytemuck::{Pod, Zeroable};

use super::MAX_PODS;
use crate::{Addr, NetnsCookie, Slot};

/// Key of ORIG_DST: the 4-tuple of the redirected connection, in its namespace.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Hash, Debug)]
#[repr(C)]
pub struct ConnKey {
    /// Netns cookie: two pods may have the same addresses and ports.
    pub netns: NetnsCookie,
    /// Address of the end that called connect().
    pub client: Addr,
    /// Address of the proxy's end.
    pub proxy: Addr,
    /// Host order.
    pub client_port: u16,
    /// Host order.
    pub proxy_port: u16,
    /// Zero, except in RELEASES.
    pub reserved: u32,
}

/// Value of ORIG_DST.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct OrigDst {
    /// The original destination.
    pub addr: Addr,
    /// The source address that the client's socket would have without the redirect; unspecified if it has that one.
    pub source: Addr,
    /// The original port (host order) in the lowest 16 bits, the ends that are open (bits of [`end`]) from bit 32, the
    /// pod's slot from bit 48. One word, because Rust has no smaller atomics for BPF. The last end deletes the entry.
    pub port_and_ends: u64,
}

impl OrigDst {
    /// An entry held by `ends`, of the pod with this slot.
    #[inline(always)]
    pub const fn new(addr: Addr, source: Addr, port: u16, ends: u64, slot: u16) -> Self {
        Self { addr, source, port_and_ends: port as u64 | ends | (slot as u64) << 48 }
    }

    /// [`super::PodPolicy::slot`] of the pod, from the word that holds it.
    #[inline(always)]
    pub const fn slot(port_and_ends: u64) -> Slot {
        Slot((port_and_ends >> 48) as u32)
    }

    /// The original port, in host order.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "the low half is a port")]
    pub const fn port(&self) -> u16 {
        self.port_and_ends as u16
    }
}

/// Bits of the ends in [`OrigDst::port_and_ends`].
pub mod end {
    /// The client's socket.
    pub const CLIENT: u64 = 1 << 32;
    /// The socket that the proxy accepted.
    pub const PROXY: u64 = 1 << 33;
    /// TPROXY: the connection is not rewritten; because of this entry sk_lookup hands it to the inbound listener.
    pub const STEERED: u64 = 1 << 34;
    /// TPROXY: the proxy's connection to the application; because of this entry sk_lookup passes it.
    pub const BYPASS: u64 = 1 << 35;
    /// The client closed its socket before the proxy's end existed; no further callback may come for it.
    pub const ABANDONED: u64 = 1 << 36;
}

/// Value of SOCKETS.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct SocketState {
    /// The original destination, the DNS server asked first, or the client ([`socket::TRANSLATED`]).
    pub addr: Addr,
    /// The source address that the socket would have without the redirect, if it differs; else unspecified.
    pub source: Addr,
    /// Port of `addr`, host order.
    pub port: u16,
    /// One of [`socket`].
    pub kind: u16,
    /// [`super::PodPolicy::slot`].
    pub slot: u16,
    /// 1 if the socket was bound for a redirect rather than by the process.
    pub bound: u16,
    /// The proxy's port, in host order.
    pub proxy_port: u16,
    /// Which of the proxy's ports that is: a [`super::ProxyPort`].
    pub proxy_role: u16,
}

/// Values of [`SocketState::kind`].
pub mod socket {
    /// TCP, redirected.
    pub const REDIRECTED: u16 = 1;
    /// TCP that sk_lookup hands to the inbound listener (TPROXY).
    pub const STEERED: u16 = 2;
    /// UDP with a redirected query.
    pub const DATAGRAM: u16 = 3;
    /// TCP that sk_lookup passes (TPROXY).
    pub const BYPASS: u16 = 4;
    /// UDP without a redirected query; only [`super::SocketState::bound`] is valid.
    pub const IDLE: u16 = 5;
    /// The proxy's end of a connection whose client address was rewritten by NAT.
    pub const TRANSLATED: u16 = 6;
    /// TCP whose redirected connection was refused; only [`super::SocketState::source`] is valid.
    pub const FAILED: u16 = 7;
}

/// Value of HANDSHAKES: a redirected connection during its handshake, indexed by the sequence number of its SYN, which NAT
/// does not change. A later one with the same index overwrites it; only an entry of ORIG_DST makes it valid.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Handshake {
    /// Netns cookie.
    pub netns: NetnsCookie,
    /// The client's address before NAT.
    pub client: Addr,
    /// Initial sequence number of the client.
    pub isn: u32,
    /// Host order.
    pub client_port: u16,
    /// Zero.
    pub reserved: u16,
}

const _: () = {
    // 48 of the hash element's head + 48 + 40 + 8 of the allocator's: a 192-byte object.
    assert!(size_of::<ConnKey>() == 48);
    assert!(size_of::<OrigDst>() == 40);
    assert!(size_of::<SocketState>() == 44);
    assert!(size_of::<Handshake>() == 32);
    // The slot has 16 bits in OrigDst.
    assert!(MAX_PODS <= 1 << 16);
};
