//! Shadow mode: what the programs remember to compare a decision with what happened to the connection.

use bytemuck::{Pod, Zeroable};

use super::MAX_REASONS;
use crate::{Addr, NetnsCookie, Reason};

/// Sets of SHADOW_CONNS, each with room for two connections. A power of two.
pub const SHADOW_CONNS: u32 = 1 << 14;
/// Queries and arrivals that are remembered until they can be compared. The oldest make room for new ones, so that no
/// connection fails.
pub const SHADOW_FLOWS: u32 = 1 << 13;
/// Cells for decisions on TCP between connect() and the SYN, which follows at once. A power of two.
pub const SHADOW_DIALS: u32 = 1 << 12;
/// Examples of differences on a node, two for each kind.
pub const SHADOW_KINDS: u32 = 1 << 14;

/// Value of SHADOW_CONNS: the connections whose sequence numbers lead to one place. A new one replaces the older of the two,
/// which then is one of [`ShadowCounters::uncompared`]. There is no lock and no list, so that it costs as much to remember a
/// connection as to write its decision down.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct ShadowSet {
    /// Its connections.
    pub conns: [ShadowConn; 2],
}

/// A connection from its SYN until the proxy has asked for its original destination.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct ShadowConn {
    /// [`ShadowConn::id`]; [`ShadowConn::WRITING`] while the others are written; 0 if there is none.
    pub id: u64,
    /// The destination that the client dialled.
    pub dst: Addr,
    /// Creator of the client's socket.
    pub uid: u32,
    /// As `uid`.
    pub gid: u32,
    /// Port of `dst`, host order.
    pub dst_port: u16,
    /// Discriminant of the [`Reason`] of the decision.
    pub reason: u8,
    /// The decision: one of [`outcome`].
    pub expected: u8,
    /// What has happened so far: bits of [`stage`].
    pub stage: u32,
    /// When it was remembered: the low half of the kernel's jiffies.
    pub time: u32,
    /// Zero.
    pub reserved: u32,
}

impl ShadowConn {
    /// Value of `id` while one processor writes; another one then remembers nothing in this place.
    pub const WRITING: u64 = u64::MAX;

    /// A connection by the sequence number of its SYN, which NAT does not change.
    #[inline(always)]
    pub const fn id(netns: NetnsCookie, isn: u32) -> u64 {
        netns.0 << 32 | isn as u64
    }

    /// Index of its set in SHADOW_CONNS.
    #[inline(always)]
    pub const fn set_of(id: u64) -> u32 {
        spread(id) % SHADOW_CONNS
    }
}

/// Bits of [`ShadowConn::stage`].
pub mod stage {
    /// What happened, one of [`super::outcome`]. Valid with [`RECEIVED`].
    pub const OUTCOME: u32 = 0xff;
    /// A listener of the pod has received the SYN.
    pub const RECEIVED: u32 = 1 << 8;
    /// The proxy has asked for the original destination.
    pub const ASKED: u32 = 1 << 9;
    /// It is counted as one that cannot be compared.
    pub const UNCOMPARED: u32 = 1 << 10;
}

/// Cookies and sequence numbers that are in use at once often differ in few bits: each processor takes 4096 cookies at a time.
#[inline(always)]
const fn spread(number: u64) -> u32 {
    (number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u32
}

/// Key of SHADOW_FLOWS.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Hash, Debug)]
#[repr(C)]
pub struct ShadowKey {
    /// Netns cookie.
    pub netns: NetnsCookie,
    /// Address of the client.
    pub addr: Addr,
    /// The client's port, host order.
    pub port: u32,
    /// One of [`remembered`].
    pub kind: u32,
}

/// Values of [`ShadowKey::kind`].
pub mod remembered {
    /// The last datagram that reached the proxy's DNS port from a port of the pod.
    pub const QUERY: u32 = 1;
    /// The last SYN from outside that came from this end.
    pub const ARRIVAL: u32 = 2;
}

/// Value of SHADOW_FLOWS. Only the field of its kind is valid.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct RememberedFlow {
    /// When a query reached the proxy, in nanoseconds of `CLOCK_MONOTONIC`.
    pub time: u64,
    /// Interface on which a SYN arrived.
    pub ifindex: u32,
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

impl ShadowSocket {
    /// Index of a socket's cell in SHADOW_DIALS, by its cookie. Of two sockets that have one cell and are between connect() and
    /// the SYN at the same time, the first is one of [`ShadowCounters::uncompared`].
    #[inline(always)]
    pub const fn dial_of(cookie: u64) -> u32 {
        spread(cookie) % SHADOW_DIALS
    }
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
    assert!(size_of::<RememberedFlow>() == 16);
    assert!(size_of::<ShadowConn>() == 48);
    assert!(size_of::<ShadowSet>() == 96);
    assert!(SHADOW_CONNS.is_power_of_two() && SHADOW_DIALS.is_power_of_two());
    assert!(size_of::<ShadowSocket>() == 48);
    assert!(size_of::<ShadowCounters>() == 16 * MAX_REASONS + 16);
    assert!(size_of::<DifferenceKey>() == 16);
    assert!(size_of::<ComparedFlow>() == 80);
};
