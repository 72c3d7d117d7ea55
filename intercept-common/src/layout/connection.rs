//! What is known of a redirected connection, of a socket, and of a connection that is being set up.

use bytemuck::{Pod, Zeroable};

use super::MAX_PODS;
use crate::Addr;

/// Key of ORIG_DST: the redirected connection as it is on the wire, in its own namespace.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Hash, Debug)]
#[repr(C)]
pub struct ConnKey {
    /// Netns cookie: two pods may have the same addresses and ports.
    pub netns: u64,
    /// The end that dialled.
    pub client: Addr,
    /// The proxy's end.
    pub proxy: Addr,
    /// Host order.
    pub client_port: u16,
    /// Host order.
    pub proxy_port: u16,
    /// Zero, but in RELEASES.
    pub reserved: u32,
}

/// Value of ORIG_DST.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct OrigDst {
    /// What the client dialled.
    pub addr: Addr,
    /// The address that the client's socket has without us; unspecified if that is the one it has.
    pub source: Addr,
    /// Its port (host order) in the lowest 16 bits, the ends that are alive (bits of [`end`]) from bit 32, the pod's
    /// slot from bit 48: one word, because BPF has no smaller atomics in Rust. The entry goes with the last end.
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
    pub const fn slot(port_and_ends: u64) -> u32 {
        (port_and_ends >> 48) as u32
    }

    /// What the client dialled; host order.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "the low half is a port")]
    pub const fn port(&self) -> u16 {
        self.port_and_ends as u16
    }
}

/// Bits of the ends in [`OrigDst::port_and_ends`].
pub mod end {
    /// The socket that dialled.
    pub const CLIENT: u64 = 1 << 32;
    /// The socket that the proxy accepts.
    pub const PROXY: u64 = 1 << 33;
    /// TPROXY: the connection was not rewritten; sk_lookup steers it by this entry.
    pub const STEERED: u64 = 1 << 34;
    /// TPROXY: the proxy goes on to the application; sk_lookup leaves it alone by this entry.
    pub const BYPASS: u64 = 1 << 35;
    /// The client closed its socket before the proxy's end was there, and may not be heard of again.
    pub const ABANDONED: u64 = 1 << 36;
}

/// Value of SOCKETS.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct SocketState {
    /// What was dialled, the DNS server asked first, or the client ([`socket::TRANSLATED`]).
    pub addr: Addr,
    /// The address that the socket has without us, if it is another one; else unspecified.
    pub source: Addr,
    /// Port of `addr`, host order.
    pub port: u16,
    /// One of [`socket`].
    pub kind: u16,
    /// [`super::PodPolicy::slot`].
    pub slot: u16,
    /// 1 if the address that the socket is bound to was bound for a redirect, rather than by the process.
    pub bound: u16,
    /// The port that is dialled, host order.
    pub proxy_port: u16,
    /// The index of that port among the proxy's: a [`super::ProxyPort`].
    pub proxy_role: u16,
}

/// Values of [`SocketState::kind`].
pub mod socket {
    /// TCP whose destination was rewritten.
    pub const REDIRECTED: u16 = 1;
    /// TCP that sk_lookup is to steer.
    pub const STEERED: u16 = 2;
    /// A datagram socket with a query under way.
    pub const DATAGRAM: u16 = 3;
    /// TCP that sk_lookup is to leave alone.
    pub const BYPASS: u16 = 4;
    /// A datagram socket without one, of which only [`super::SocketState::bound`] is to be known.
    pub const IDLE: u16 = 5;
    /// The proxy's end of a connection whose client has another address here than where it dialled, by NAT.
    pub const TRANSLATED: u16 = 6;
}

/// Value of HANDSHAKES: a redirected connection that is being set up, found by the sequence number of its SYN, which
/// NAT does not change. Overwritten by a later one of the same index; the entry of ORIG_DST decides whether it is right.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Handshake {
    /// Netns cookie.
    pub netns: u64,
    /// The client's address where it dialled.
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
