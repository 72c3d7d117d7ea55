//! The layouts of all maps. Every struct is plain old data without padding: a byte of padding in a key is a lookup that
//! misses, so the sizes are asserted at compile time.
//!
//! Ports are in host order, addresses in network order, ids are those of the initial user namespace.

use bytemuck::{Pod, Zeroable};

use crate::{Addr, NetnsCookie, PolicyId, Reason, Slot, failure::Failure};

mod connection;
mod proxy;
mod shadow;

pub use connection::{ConnKey, Handshake, OrigDst, SocketState, end, socket};
pub use proxy::{APPLICATION_LISTENERS, ListenerKey, Proxy, ProxyPort, Ring, bound, scope};
pub use shadow::{
    ComparedFlow, DifferenceKey, RememberedFlow, SHADOW_CONNS, SHADOW_DIALS, SHADOW_FLOWS, SHADOW_KINDS,
    ShadowConn, ShadowCounters, ShadowKey, ShadowSet, ShadowSocket, outcome, remembered, stage,
};

/// Version of the layouts in this file and its folder, part of the pin path. Any change of a layout raises it.
pub const VERSION: u32 = 9;

/// Most users and most groups that `-u` and `-g` may name.
pub const MAX_OWNERS: usize = 16;
/// Most cgroups of containers in a policy: the proxy's, and those that are exempt.
pub const MAX_CONTAINERS: usize = 8;
/// Most pods on one node: the number of slots for counters.
pub const MAX_PODS: u32 = 1024;
/// How many slots below the newest listening socket of a (pod, port, family, scope) are searched for one that is still
/// open. The newest is nearly always open, and a new listener replaces a closed newest one. The search fails only if more
/// listeners than this were open at once, and all of them were closed while an older one stayed open.
pub const LISTENER_SEARCH: u32 = 256;
/// Most open listening sockets of a (pod, port, family, scope). A further one receives no connections.
pub const LISTENER_SLOTS: u32 = 512;
/// Concurrent handshakes that can be told apart when NAT rewrites the client's address. A power of two.
pub const HANDSHAKES: u32 = 1 << 14;

/// Budgets of one pod in the maps that all pods share. Each map has room for twice the budgets of all pods, because a new
/// policy is written beside the one that it replaces. No pod can use up another's room.
pub mod budget {
    use super::MAX_PODS;

    /// Prefixes in DESTINATIONS: those from CIDR lists and routes that differ from the prefix around them.
    pub const DESTINATIONS: u32 = 1 << 14;
    /// Prefixes in PORTS: a single port takes one, a range at most 30.
    pub const PORTS: u32 = 1 << 12;
    /// Groups in GROUPS.
    pub const GROUPS: u32 = 64;
    /// Interfaces in INTERFACES, named by `-c` or `-k`.
    pub const INTERFACES: u32 = 64;

    /// Size of a map in which each pod has this budget.
    pub const fn for_all_pods(budget: u32) -> u32 {
        2 * MAX_PODS * budget
    }
}

/// Counters for [`crate::Reason`]: more than there are reasons, so that a new one does not move others.
pub const MAX_REASONS: usize = 48;
/// Counters for [`crate::failure::Failure`], as [`MAX_REASONS`].
pub const MAX_FAILURES: usize = 16;

const _: () = assert!(Reason::ALL.len() <= MAX_REASONS && Failure::ALL.len() <= MAX_FAILURES);

/// DNS servers that are remembered for a UDP socket besides its first.
pub const MAX_SERVERS: usize = 8;

/// Bits of [`PodPolicy::flags`].
pub mod policy {
    /// TPROXY rather than REDIRECT.
    pub const TPROXY: u32 = 1 << 0;
    /// `-b '*'`.
    pub const INBOUND_ALL: u32 = 1 << 1;
    /// `-b` or `-d` lists ports: inbound flows need a lookup in PORTS.
    pub const INBOUND_PORTS: u32 = 1 << 2;
    /// `-o` or `-q` lists ports: outbound flows need a lookup in PORTS.
    pub const OUTBOUND_PORTS: u32 = 1 << 3;
    /// A CIDR of `-i` is on loopback: rows 4b and 5b are skipped.
    pub const INCLUDES_LOOPBACK: u32 = 1 << 4;
    /// `--redirect-dns`.
    pub const DNS: u32 = 1 << 5;
    /// `--capture-all-dns`; only with [`DNS`].
    pub const DNS_ALL: u32 = 1 << 6;
    /// Only owners in GROUPS are captured.
    pub const GROUPS_ONLY: u32 = 1 << 7;
    /// Owners in GROUPS are not captured.
    pub const GROUPS_EXCEPT: u32 = 1 << 8;
    /// `-c` or `-k` lists interfaces: inbound flows need a lookup in INTERFACES.
    pub const INTERFACES: u32 = 1 << 9;
    /// Flows pass while the proxy does not listen.
    pub const OPEN_WITHOUT_PROXY: u32 = 1 << 10;
    /// The IPv4 stand-in addresses ([`crate::Addr::stand_in`]) are local in the namespace.
    pub const STAND_IN_V4: u32 = 1 << 11;
    /// The IPv6 stand-in addresses are local in the namespace.
    pub const STAND_IN_V6: u32 = 1 << 12;
    /// The IPv4 sources that encode a number ([`crate::Addr::numbered`]) are local in the namespace.
    pub const NUMBERED_V4: u32 = 1 << 13;
    /// IPv6 is not captured.
    pub const WITHOUT_IPV6: u32 = 1 << 14;
    /// The container of a process counts: outbound flows need the cgroup of the running task.
    pub const CONTAINERS: u32 = 1 << 15;
    /// Only processes of the proxy's container are the proxy; only with [`CONTAINERS`].
    pub const PROXY_CONTAINER: u32 = 1 << 16;
    /// DNS over TCP is not captured; only with [`DNS`].
    pub const DNS_UDP_ONLY: u32 = 1 << 17;
    /// The proxy's connections to its own pod are not captured: rows 4a and 5a are skipped.
    pub const WITHOUT_SELF_CAPTURE: u32 = 1 << 18;
    /// The programs decide and compare, and change nothing.
    pub const SHADOW: u32 = 1 << 19;
    /// Of a machine's workload, of which a namespace may have several. The policy may expire.
    pub const MACHINE: u32 = 1 << 24;
    /// Inbound connections are captured only if a socket of the workload listens for them; only with [`MACHINE`].
    pub const BY_LISTENER: u32 = 1 << 25;
}

/// What a container is, in [`PodPolicy::cgroup_kinds`].
pub mod container {
    /// The proxy's.
    pub const PROXY: u32 = 1 << 0;
    /// One whose outbound flows are not captured.
    pub const EXEMPT: u32 = 1 << 1;
}

/// Bits of [`Destination::flags`].
pub mod destination {
    /// There is a route.
    pub const ROUTED: u32 = 1 << 0;
    /// The route goes through the loopback interface.
    pub const LO: u32 = 1 << 1;
    /// In `ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR`, or `::1`.
    pub const LOCALHOST: u32 = 1 << 2;
    /// The route goes through an interface of `-c`.
    pub const EXCLUDED_EGRESS: u32 = 1 << 3;
    /// In `-i`.
    pub const INCLUDED: u32 = 1 << 4;
    /// In `-x`.
    pub const EXCLUDED: u32 = 1 << 5;
    /// A DNS server of the pod.
    pub const RESOLVER: u32 = 1 << 6;
    /// A multicast or broadcast address.
    pub const GROUP: u32 = 1 << 7;
    /// In `--exclude-inbound-cidr`: inbound connections from this address are not captured.
    pub const EXCLUDED_SOURCE: u32 = 1 << 8;
}

/// Bits of the value in PORTS.
pub mod port {
    /// In `-b`.
    pub const INBOUND: u32 = 1 << 0;
    /// In `-d`.
    pub const INBOUND_EXCLUDED: u32 = 1 << 1;
    /// In `-q`.
    pub const OUTBOUND: u32 = 1 << 2;
    /// In `-o`.
    pub const OUTBOUND_EXCLUDED: u32 = 1 << 3;
}

/// Bits of the value in INTERFACES.
pub mod interface {
    /// In `-c`.
    pub const EXCLUDED: u32 = 1 << 0;
    /// In `-k`.
    pub const VIRT: u32 = 1 << 1;
}

/// Value of POLICIES: the part of a pod's policy that has a fixed size. Lists are in maps of their own under
/// [`PodPolicy::id`]: a new policy is built beside the old one under a new id, and replacing this one value activates it.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct PodPolicy {
    /// First field of the keys in DESTINATIONS, PORTS, GROUPS and INTERFACES. Never 0.
    pub id: PolicyId,
    /// Index into PROXY_STATE and COUNTERS.
    pub slot: Slot,
    /// Bits of [`policy`].
    pub flags: u32,
    /// The proxy's port for outbound TCP, `-p`. Ports are in host order.
    pub outbound_port: u16,
    /// The proxy's port for inbound TCP, `-z`.
    pub inbound_port: u16,
    /// The tunnel port, `-e`.
    pub tunnel_port: u16,
    /// The proxy's port for DNS, `--dns-capture-port`.
    pub dns_port: u16,
    /// `-t`; 0 unless the mode is TPROXY.
    pub tproxy_mark: u32,
    /// Most concurrent redirected connections; one more `connect()` fails with ENOBUFS.
    pub max_connections: u32,
    /// Number of entries in `uids`.
    pub uid_count: u16,
    /// Number of entries in `gids`.
    pub gid_count: u16,
    /// `-u`, in order; unused elements repeat the first.
    pub uids: [u32; MAX_OWNERS],
    /// `-g`, in order; as `uids`.
    pub gids: [u32; MAX_OWNERS],
    /// The level in the cgroup hierarchy of all cgroups in `cgroup_ids`; the root has level 0.
    pub cgroup_level: u32,
    /// Zero. The programs read it where they need a zero that the verifier does not know.
    pub zero: u32,
    /// Ids of the cgroups of containers; 0 for unused elements.
    pub cgroup_ids: [u64; MAX_CONTAINERS],
    /// Bits of [`container`] for each of `cgroup_ids`.
    pub cgroup_kinds: [u32; MAX_CONTAINERS],
    /// When the policy has no effect any more, in nanoseconds of `CLOCK_BOOTTIME`; 0 for never. Only with
    /// [`policy::MACHINE`].
    pub expires_at: u64,
}

/// Key of DESTINATIONS after its prefix length (in bits, 32 of them for the policy).
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Hash, Debug)]
#[repr(C)]
pub struct DestinationKey {
    /// [`PodPolicy::id`].
    pub policy: PolicyId,
    /// Network order; IPv4 mapped, so that its prefix length is 96 more.
    pub addr: Addr,
}

/// Value of DESTINATIONS: everything about an address, from the CIDR lists and the namespace's routes. One lookup answers
/// every row that depends on the destination.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Destination {
    /// Bits of [`destination`].
    pub flags: u32,
    /// The source address that the route gives an unbound socket; unspecified if it is not known.
    pub source: Addr,
}

/// Key of PORTS after its prefix length (in bits, 32 of them for the policy and 16 for the port).
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Hash, Debug)]
#[repr(C)]
pub struct PortKey {
    /// [`PodPolicy::id`].
    policy: PolicyId,
    /// Network order, so that the bits of a prefix come first in memory.
    port: u16,
    /// Zero.
    reserved: u16,
}

impl PortKey {
    /// Prefix length of a single port.
    pub const BITS: u32 = 48;

    /// The key of a port, or of the first port of a prefix; host order.
    #[inline(always)]
    pub const fn new(policy: PolicyId, port: u16) -> Self {
        Self { policy, port: port.to_be(), reserved: 0 }
    }

    /// [`PodPolicy::id`].
    pub const fn policy(&self) -> PolicyId {
        self.policy
    }
}

/// Key of GROUPS and INTERFACES: a member of one policy's set.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Hash, Debug)]
#[repr(C)]
pub struct MemberKey {
    /// [`PodPolicy::id`].
    pub policy: PolicyId,
    /// A gid or an interface index.
    pub member: u32,
}

/// Value of DNS_SERVERS: the servers that a UDP socket has asked besides its first. Each has a number, and queries to it
/// come from the source address that encodes the number ([`Addr::numbered`]), which identifies the answer.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct DnsServers {
    /// The next number; only its low 16 bits are used.
    pub next: u32,
    /// Indexed by number modulo [`MAX_SERVERS`]; a new server replaces the oldest.
    pub addrs: [Addr; MAX_SERVERS],
}

/// Access to the fields of [`DnsServers`]: in the programs through a pointer to the map's value. Numbers are derived here.
#[expect(clippy::cast_possible_truncation, reason = "only the low half of `next` is used")]
pub trait ServerNumbers {
    /// [`DnsServers::next`].
    fn next(&self) -> u32;
    /// Sets [`DnsServers::next`].
    fn set_next(&mut self, next: u32);
    /// Element `slot` of [`DnsServers::addrs`]; `slot` is below [`MAX_SERVERS`].
    fn addr(&self, slot: usize) -> Addr;
    /// Sets element `slot` of [`DnsServers::addrs`].
    fn set_addr(&mut self, slot: usize, addr: Addr);

    /// The number of a server. `None` if it is not remembered.
    #[inline(always)]
    fn number_of(&self, server: Addr) -> Option<u16> {
        let next = self.next();
        for slot in 0..MAX_SERVERS {
            if self.addr(slot) == server {
                // The last number before `next` that leads to this slot.
                let age = (next as usize).wrapping_sub(1).wrapping_sub(slot) % MAX_SERVERS;
                return Some((next as u16).wrapping_sub(1).wrapping_sub(age as u16));
            }
        }
        None
    }

    /// Remembers a server and returns its number. Of two threads that add one at the same time, one server may be lost.
    #[inline(always)]
    fn add(&mut self, server: Addr) -> u16 {
        let number = self.next();
        self.set_addr(number as usize % MAX_SERVERS, server);
        self.set_next(number.wrapping_add(1));
        number as u16
    }

    /// The server with this number. `None` if another has replaced it.
    #[inline(always)]
    fn server(&self, number: u16) -> Option<Addr> {
        let age = (self.next() as u16).wrapping_sub(number);
        let addr = self.addr(number as usize % MAX_SERVERS);
        if age == 0 || age as usize > MAX_SERVERS || addr.is_unspecified() { None } else { Some(addr) }
    }
}

/// What stands in the code of a pod's stub for the address of the cell that has the cookie of its namespace: the agent replaces
/// it when it loads the stub. The bytes are `intercep`.
pub const COOKIE_PLACEHOLDER: u64 = 0x696e_7465_7263_6570;

/// Value of LOOKUP_SCRATCH, per CPU: the socket lookup in progress.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct LookupScratch {
    /// Netns cookie.
    pub netns: NetnsCookie,
    /// Ports, and the remote address of an IPv4 lookup, so that the cookie of another lookup is not mistaken for its own.
    pub tag: u64,
    /// After the decision, the listeners to search: their port (host order) from bit 16, and [`Proxy::index`] for IPv4 in
    /// the lowest bits.
    pub listeners: u64,
}

/// Value of COUNTERS, per CPU.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct ReasonCounters {
    /// Indexed by [`Reason`].
    pub decisions: [u64; MAX_REASONS],
    /// Indexed by [`Failure`].
    pub failures: [u64; MAX_FAILURES],
}

impl ReasonCounters {
    /// The count of each reason.
    pub fn by_reason(&self) -> impl Iterator<Item = (Reason, u64)> {
        Reason::ALL.iter().copied().zip(self.decisions)
    }

    /// The count of each failure.
    pub fn by_failure(&self) -> impl Iterator<Item = (Failure, u64)> {
        Failure::ALL.iter().copied().zip(self.failures)
    }

    /// Adds those of another CPU.
    pub fn add(&mut self, other: &Self) {
        let theirs = other.decisions.iter().chain(&other.failures);
        for (own, more) in self.decisions.iter_mut().chain(&mut self.failures).zip(theirs) {
            *own += more;
        }
    }
}

/// Bytes of EVENTS.
pub const EVENTS_SIZE: u32 = 1 << 20;

/// Record of EVENTS.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Event {
    /// Nanoseconds of `CLOCK_MONOTONIC`.
    pub time: u64,
    /// Netns cookie.
    pub netns: NetnsCookie,
    /// Destination address.
    pub dst: Addr,
    /// The address that the socket is bound to (outbound), or the remote client (inbound).
    pub src: Addr,
    /// Host order.
    pub dst_port: u16,
    /// Host order.
    pub src_port: u16,
    /// Thread group id; 0 for inbound flows.
    pub pid: u32,
    /// Owner of the socket; `u32::MAX` for inbound flows, which have none.
    pub uid: u32,
    /// As `uid`.
    pub gid: u32,
    /// Discriminant of [`crate::Reason`], for a decision.
    pub reason: u8,
    /// IPPROTO_TCP (6) or IPPROTO_UDP (17).
    pub protocol: u8,
    /// 1 for an inbound flow.
    pub inbound: u8,
    /// Bits of [`container`].
    pub container: u8,
    /// Name of the task, padded with NUL; empty for inbound flows.
    pub comm: [u8; 16],
    /// 0 for a decision. Otherwise what became of a connection between proxies: 1 and the index of its counter in
    /// [`crate::acceleration::JoinCounters`].
    pub acceleration: u32,
}

const _: () = {
    assert!(size_of::<PodPolicy>() == 48 + 8 * MAX_OWNERS + 12 * MAX_CONTAINERS);
    assert!(size_of::<DestinationKey>() == 20);
    assert!(size_of::<Destination>() == 20);
    assert!(size_of::<MemberKey>() == 8);
    assert!(size_of::<PortKey>() == 8);
    assert!(size_of::<ReasonCounters>() == 8 * (MAX_REASONS + MAX_FAILURES));
    assert!(size_of::<DnsServers>() == 132);
    assert!(size_of::<Event>() == 88);
};

#[cfg(test)]
mod tests {
    use super::*;

    impl ServerNumbers for DnsServers {
        fn next(&self) -> u32 {
            self.next
        }
        fn set_next(&mut self, next: u32) {
            self.next = next;
        }
        fn addr(&self, slot: usize) -> Addr {
            self.addrs[slot]
        }
        fn set_addr(&mut self, slot: usize, addr: Addr) {
            self.addrs[slot] = addr;
        }
    }

    #[test]
    fn servers_are_found_by_number_until_they_give_way() {
        let mut servers = DnsServers { next: 0xfffa, ..DnsServers::zeroed() };
        let addr = |n: u32| Addr::from_v4((0x0a00_0000 + n).to_be());
        assert_eq!(servers.server(0xfff9), None, "no server has been asked");
        let mut numbers = [0; MAX_SERVERS + 2];
        for (n, number) in (0..).zip(&mut numbers) {
            *number = servers.add(addr(n));
        }
        for (n, number) in (0..).zip(&numbers) {
            let remembered = n >= 2;
            assert_eq!(servers.server(*number), remembered.then_some(addr(n)), "{n}");
            assert_eq!(servers.number_of(addr(n)), remembered.then_some(*number), "{n}");
        }
        assert_eq!(servers.server(numbers[MAX_SERVERS + 1].wrapping_add(1)), None);
    }
}
