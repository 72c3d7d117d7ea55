//! Shadow mode: what the programs remember to compare a decision with what happened to the connection.

use bytemuck::{Pod, Zeroable};

use super::MAX_REASONS;
use crate::{Addr, NetnsCookie, Reason};

/// Connections and queries that are remembered until they can be compared. The oldest make room for new ones, so that no
/// connection fails, and are counted as [`ShadowCounters::uncompared`].
pub const SHADOW_FLOWS: u32 = 1 << 14;
/// Cells for decisions on TCP between connect() and the SYN, which follows at once. A socket's cell follows
/// from its cookie; two that are decided at the same time and have one cell are counted as [`ShadowCounters::uncompared`].
pub const SHADOW_DIALS: u32 = 1 << 12;
/// Examples of differences on a node, two for each kind.
pub const SHADOW_KINDS: u32 = 1 << 14;

/// Key of SHADOW_FLOWS.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Hash, Debug)]
#[repr(C)]
pub struct ShadowKey {
    /// Netns cookie.
    pub netns: NetnsCookie,
    /// Address of the client, for [`remembered::ENDS`] and [`remembered::ARRIVAL`].
    pub addr: Addr,
    /// The initial sequence number ([`remembered::SYN`]), the client's port in the upper half and that of the listener's
    /// end in the lower ([`remembered::ENDS`]), or the client's port. Ports are in host order.
    pub number: u32,
    /// One of [`remembered`].
    pub kind: u32,
}

/// Values of [`ShadowKey::kind`].
pub mod remembered {
    /// A connection of the pod during its handshake, by the sequence number of its SYN, which NAT does not change.
    pub const SYN: u32 = 1;
    /// A connection by its ends, until the proxy asks for the original destination.
    pub const ENDS: u32 = 2;
    /// The last datagram that reached the proxy's DNS port from a port of the pod.
    pub const QUERY: u32 = 3;
    /// The last SYN from outside that came from this end.
    pub const ARRIVAL: u32 = 4;
}

/// Value of SHADOW_FLOWS. Only the fields of its kind are valid.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct RememberedFlow {
    /// The destination that the client dialled; unspecified for a client outside of the pod.
    pub dst: Addr,
    /// Address at which a listener of the pod received it.
    pub local: Addr,
    /// When a query reached the proxy, in nanoseconds of `CLOCK_MONOTONIC`.
    pub time: u64,
    /// Address of the proxy's socket that has asked for the original destination; 0 before.
    pub asked_by: u64,
    /// Creator of the client's socket.
    pub uid: u32,
    /// As `uid`.
    pub gid: u32,
    /// Interface on which it arrived.
    pub ifindex: u32,
    /// Port of `dst`. Ports are in host order.
    pub dst_port: u16,
    /// Port of `local`.
    pub local_port: u16,
    /// Port of the listener that received it; 0 if none in this pod did.
    pub listener: u16,
    /// Discriminant of the [`Reason`] of the decision.
    pub reason: u8,
    /// The decision: one of [`outcome`].
    pub expected: u8,
    /// Zero.
    pub reserved: u32,
}

/// What becomes of a flow, by decision or in fact.
pub mod outcome {
    /// It passes.
    pub const PASSED: u8 = 0;
    /// It goes to the proxy's port for outbound TCP.
    pub const OUTBOUND: u8 = 1;
    /// It goes to the proxy's port for inbound TCP.
    pub const INBOUND: u8 = 2;
    /// It goes to the proxy's port for DNS.
    pub const DNS: u8 = 3;
    /// The proxy receives it, and is told another original destination.
    pub const OTHER_DST: u8 = 4;

    /// The word for it.
    pub const fn as_str(outcome: u8) -> &'static str {
        match outcome {
            PASSED => "passed",
            OUTBOUND => "redirected to outbound",
            INBOUND => "redirected to inbound",
            DNS => "redirected to dns",
            _ => "another original destination",
        }
    }
}

/// Value of SHADOW_DIALS (TCP) and SHADOW_SOCKETS (UDP): the decision on a socket.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct ShadowSocket {
    /// The destination.
    pub dst: Addr,
    /// When the first query that is not answered was sent, in nanoseconds of `CLOCK_MONOTONIC`.
    pub time: u64,
    /// Cookie of the socket, for SHADOW_DIALS.
    pub cookie: u64,
    /// Creator of the socket.
    pub uid: u32,
    /// As `uid`.
    pub gid: u32,
    /// Discriminant of the [`Reason`].
    pub reason: u8,
    /// The decision: one of [`outcome`].
    pub expected: u8,
    /// Port of `dst`, host order.
    pub dst_port: u16,
    /// UDP: nonzero if there is a query that is not answered.
    pub is_waiting: u32,
}

/// Value of SHADOW_COUNTERS.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct ShadowCounters {
    /// Flows for which the decision is what happened, by [`Reason`].
    pub agreed: [u64; MAX_REASONS],
    /// The others, by [`Reason`].
    pub differed: [u64; MAX_REASONS],
    /// Flows of which the programs could not tell what happened.
    pub uncompared: u64,
    /// When counting began, in seconds since 1970.
    pub since: u64,
}

impl ShadowCounters {
    /// The counts of each reason: agreed, and differed.
    pub fn by_reason(&self) -> impl Iterator<Item = (Reason, u64, u64)> {
        Reason::ALL.iter().zip(self.agreed.iter().zip(&self.differed)).map(|(r, (a, d))| (*r, *a, *d))
    }

    /// Number of flows that differed.
    pub fn total_differed(&self) -> u64 {
        self.differed.iter().sum()
    }

    /// Number of flows that were compared.
    pub fn total_compared(&self) -> u64 {
        self.agreed.iter().sum::<u64>() + self.total_differed()
    }
}

/// Key of SHADOW_KINDS: a kind of difference.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
#[repr(C)]
pub struct DifferenceKey {
    /// Netns cookie.
    pub netns: NetnsCookie,
    /// Discriminant of the [`Reason`] of the decision.
    pub reason: u8,
    /// The decision: one of [`outcome`].
    pub expected: u8,
    /// What happened: one of [`outcome`].
    pub actual: u8,
    /// 0 for the first flow of the kind, 1 for the last.
    pub is_last: u8,
    /// Zero.
    pub reserved: [u8; 4],
}

/// Value of SHADOW_KINDS: a flow that was compared.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct ComparedFlow {
    /// Number of flows of the kind, with the first flow; else 1.
    pub count: u64,
    /// Nanoseconds of `CLOCK_MONOTONIC`.
    pub time: u64,
    /// Address of the client.
    pub src: Addr,
    /// The original destination.
    pub dst: Addr,
    /// [`outcome::OTHER_DST`]: what the proxy is told.
    pub other: Addr,
    /// Ports are in host order.
    pub src_port: u16,
    /// Port of `dst`.
    pub dst_port: u16,
    /// Port of `other`.
    pub other_port: u16,
    /// `IPPROTO_*`.
    pub protocol: u16,
    /// Owner of the client's socket; `u32::MAX` for a client outside of the pod.
    pub uid: u32,
    /// As `uid`.
    pub gid: u32,
}

const _: () = {
    assert!(size_of::<ShadowKey>() == 32);
    assert!(size_of::<RememberedFlow>() == 72);
    assert!(size_of::<ShadowSocket>() == 48);
    assert!(size_of::<ShadowCounters>() == 16 * MAX_REASONS + 16);
    assert!(size_of::<DifferenceKey>() == 16);
    assert!(size_of::<ComparedFlow>() == 80);
};
