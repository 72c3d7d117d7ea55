//! The layouts of all maps. Every struct is plain old data without padding; sizes are asserted here because a
//! byte of padding in a key is a look-up that misses.
//!
//! Ports are in host order, addresses in network order, ids are those of the initial user namespace.

use bytemuck::{Pod, Zeroable};

use crate::{Addr, Reason, failure::Failure};

mod connection;
mod proxy;

pub use connection::{ConnKey, Handshake, OrigDst, SocketState, end, socket};
pub use proxy::{ListenerKey, Proxy, ProxyPort, Ring, bound, scope};

/// Version of everything in this file and its folder; part of the pin path. A change of any layout raises it.
pub const VERSION: u32 = 5;

/// Most users and most groups that `-u` and `-g` may name.
pub const MAX_OWNERS: usize = 16;
/// Pods on one node: as many counters' slots there are.
pub const MAX_PODS: u32 = 1024;
/// How far below the newest listening socket of a (pod, port, family, scope) a connection looks for one that is still
/// open. The newest is nearly always open, and what opens next takes the place of a newest that is not: more than this
/// many must have been open together and be closed, all of them newer than one that is open.
pub const LISTENER_SEARCH: u32 = 256;
/// Connections that are being set up at the same time and can be told apart when NAT rewrites the client's address.
pub const HANDSHAKES: u32 = 1 << 14;

/// What one pod may have in the maps that all pods share. Each map has room for twice as much for every pod, because a
/// new policy is written beside the one that it replaces: no pod can take another's room.
pub mod budget {
    use super::MAX_PODS;

    /// Prefixes in DESTINATIONS: those of its lists and of its routes that differ from what is around them.
    pub const DESTINATIONS: u32 = 1 << 14;
    /// Prefixes in PORTS: a range of ports is at most 28 of them, a single port one.
    pub const PORTS: u32 = 1 << 12;
    /// Groups in GROUPS.
    pub const GROUPS: u32 = 64;
    /// Interfaces in INTERFACES that -c or -k name.
    pub const INTERFACES: u32 = 64;

    /// Entries of a map of which a pod may have `budget`.
    pub const fn for_all_pods(budget: u32) -> u32 {
        2 * MAX_PODS * budget
    }
}

/// Places for counters of [`crate::Reason`] and of [`crate::failure::Failure`]: more than there are, so that a new one
/// moves no other.
pub const MAX_REASONS: usize = 48;
/// See [`MAX_REASONS`].
pub const MAX_FAILURES: usize = 16;

const _: () = assert!(Reason::ALL.len() <= MAX_REASONS && Failure::ALL.len() <= MAX_FAILURES);

/// DNS servers that a datagram socket may ask besides its first without one being forgotten.
pub const MAX_SERVERS: usize = 8;

/// Bits of [`PodPolicy::flags`].
pub mod policy {
    /// TPROXY rather than REDIRECT.
    pub const TPROXY: u32 = 1 << 0;
    /// `-b '*'`.
    pub const INBOUND_ALL: u32 = 1 << 1;
    /// `-b` or `-d` name ports: ask PORTS for inbound flows.
    pub const INBOUND_PORTS: u32 = 1 << 2;
    /// `-o` or `-q` name ports: ask PORTS for outbound flows.
    pub const OUTBOUND_PORTS: u32 = 1 << 3;
    /// Some CIDR of `-i` is a loopback one: rows 4b and 5b are skipped.
    pub const INCLUDES_LOOPBACK: u32 = 1 << 4;
    /// `--redirect-dns` is in force.
    pub const DNS: u32 = 1 << 5;
    /// `--capture-all-dns` too.
    pub const DNS_ALL: u32 = 1 << 6;
    /// Only owners in GROUPS are captured.
    pub const GROUPS_ONLY: u32 = 1 << 7;
    /// Owners in GROUPS are not captured.
    pub const GROUPS_EXCEPT: u32 = 1 << 8;
    /// `-c` or `-k` name interfaces: ask INTERFACES for inbound flows.
    pub const INTERFACES: u32 = 1 << 9;
    /// Inbound flows pass to the application when the proxy does not listen.
    pub const OPEN_WITHOUT_PROXY: u32 = 1 << 10;
    /// The IPv4 stand-in addresses ([`crate::Addr::stand_in`]) are local in the namespace.
    pub const STAND_IN_V4: u32 = 1 << 11;
    /// The IPv6 ones are.
    pub const STAND_IN_V6: u32 = 1 << 12;
    /// The IPv4 sources that carry a number ([`crate::Addr::numbered`]) are local in the namespace.
    pub const NUMBERED_V4: u32 = 1 << 13;
    /// IPv6 is left alone.
    pub const WITHOUT_IPV6: u32 = 1 << 14;
}

/// Bits of [`Destination::flags`].
pub mod destination {
    /// A route leads there.
    pub const ROUTED: u32 = 1 << 0;
    /// Through the loopback interface.
    pub const LO: u32 = 1 << 1;
    /// In `ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR`, or `::1`.
    pub const LOCALHOST: u32 = 1 << 2;
    /// Through an interface of `-c`.
    pub const EXCLUDED_EGRESS: u32 = 1 << 3;
    /// In `-i`.
    pub const INCLUDED: u32 = 1 << 4;
    /// In `-x`.
    pub const EXCLUDED: u32 = 1 << 5;
    /// A DNS server of the pod.
    pub const RESOLVER: u32 = 1 << 6;
    /// A multicast or broadcast address.
    pub const GROUP: u32 = 1 << 7;
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

/// Value of POLICIES: what is decided the same for every flow of a pod. Lists that can be long are in maps of their
/// own, under [`PodPolicy::id`]: a new policy is built beside the old one under a fresh id and put in force by
/// replacing this one value.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct PodPolicy {
    /// Prefix of the keys in DESTINATIONS, PORTS, GROUPS and INTERFACES. Never 0.
    pub id: u32,
    /// Index into PROXY_STATE and COUNTERS.
    pub slot: u32,
    /// Bits of [`policy`].
    pub flags: u32,
    /// Where outbound TCP goes, `-p`.
    pub outbound_port: u16,
    /// Where inbound TCP goes, `-z`.
    pub inbound_port: u16,
    /// `-e`.
    pub tunnel_port: u16,
    /// 15053.
    pub dns_port: u16,
    /// `-t`; 0 unless the mode is TPROXY.
    pub tproxy_mark: u32,
    /// Most redirected connections at a time; the connect() of one more fails.
    pub max_connections: u32,
    /// How many of `uids` count.
    pub uid_count: u16,
    /// How many of `gids` count.
    pub gid_count: u16,
    /// `-u`, in order; the first again in places that are not used.
    pub uids: [u32; MAX_OWNERS],
    /// `-g`, in order; as `uids`.
    pub gids: [u32; MAX_OWNERS],
}

/// Key of DESTINATIONS after its prefix length (in bits, 32 of them for the policy).
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Hash, Debug)]
#[repr(C)]
pub struct DestinationKey {
    /// [`PodPolicy::id`].
    pub policy: u32,
    /// Network order; IPv4 mapped, so that its prefix length is 96 more.
    pub addr: Addr,
}

/// Value of DESTINATIONS: all that is known of an address, from the CIDR lists and from the namespace's routes.
/// One look-up answers every row that looks at the destination.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Destination {
    /// Bits of [`destination`].
    pub flags: u32,
    /// The source that the route would give an unbound socket; unspecified if not known.
    pub source: Addr,
}

/// Key of PORTS after its prefix length (in bits, 32 of them for the policy and 16 for the port).
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Hash, Debug)]
#[repr(C)]
pub struct PortKey {
    /// [`PodPolicy::id`].
    policy: u32,
    /// Network order: the bits of a prefix are the first ones in memory.
    port: u16,
    /// Zero.
    reserved: u16,
}

impl PortKey {
    /// Bits of the key that count for a whole port.
    pub const BITS: u32 = 48;

    /// A port, or the first of a prefix; host order.
    #[inline(always)]
    pub const fn new(policy: u32, port: u16) -> Self {
        Self { policy, port: port.to_be(), reserved: 0 }
    }

    /// [`PodPolicy::id`].
    pub const fn policy(&self) -> u32 {
        self.policy
    }
}

/// Key of GROUPS and INTERFACES: the member of a set of one policy.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Hash, Debug)]
#[repr(C)]
pub struct MemberKey {
    /// [`PodPolicy::id`].
    pub policy: u32,
    /// A gid or an interface index.
    pub member: u32,
}

/// Value of DNS_SERVERS: the DNS servers that a datagram socket has asked besides its first. Each has a number, and the
/// query to it a source of that number ([`Addr::numbered`]), by which its answer is told from the others'.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct DnsServers {
    /// The next number, of which the low 16 bits count.
    pub next: u32,
    /// By number modulo [`MAX_SERVERS`]; the oldest gives way.
    pub addrs: [Addr; MAX_SERVERS],
}

#[expect(clippy::cast_possible_truncation, reason = "the low half of `next` counts")]
impl DnsServers {
    /// The number of a server, if it is remembered.
    #[inline(always)]
    pub fn number_of(&self, addr: Addr) -> Option<u16> {
        for slot in 0..MAX_SERVERS {
            if self.addrs[slot] == addr {
                // The last number before `next` that leads to this slot.
                let age = (self.next as usize).wrapping_sub(1).wrapping_sub(slot) % MAX_SERVERS;
                return Some((self.next as u16).wrapping_sub(1).wrapping_sub(age as u16));
            }
        }
        None
    }

    /// Remember a server; its number.
    #[inline(always)]
    pub fn add(&mut self, addr: Addr) -> u16 {
        let number = self.next as u16;
        self.addrs[number as usize % MAX_SERVERS] = addr;
        self.next = self.next.wrapping_add(1);
        number
    }

    /// The server of a number; none if it has given way.
    #[inline(always)]
    pub fn server(&self, number: u16) -> Option<Addr> {
        let age = (self.next as u16).wrapping_sub(number);
        let addr = self.addrs[number as usize % MAX_SERVERS];
        if age == 0 || age as usize > MAX_SERVERS || addr.is_unspecified() { None } else { Some(addr) }
    }
}

/// Value of LOOKUP_SCRATCH, one a CPU: the look-up that is under way.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct LookupScratch {
    /// Netns cookie.
    pub netns: u64,
    /// Ports, and the remote address if it is of IPv4: another look-up's cookie is not taken for this one's.
    pub tag: u64,
    /// Once that is decided, the listeners that are to get it: their port (host order) from bit 16, and
    /// [`Proxy::index`] as of IPv4 in the lowest bits.
    pub listeners: u64,
}

/// Value of COUNTERS, one a CPU.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct ReasonCounters {
    /// By reason.
    pub decisions: [u64; MAX_REASONS],
    /// By failure.
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

/// Record of EVENTS.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Event {
    /// Nanoseconds of `CLOCK_MONOTONIC`.
    pub time: u64,
    /// Netns cookie.
    pub netns: u64,
    /// Dialled address, or the address that a connection arrived for.
    pub dst: Addr,
    /// Bound source (outbound), or the remote client (inbound).
    pub src: Addr,
    /// Host order.
    pub dst_port: u16,
    /// Host order.
    pub src_port: u16,
    /// Thread group; 0 for inbound.
    pub pid: u32,
    /// Owner of the socket; `u32::MAX` where there is none (inbound).
    pub uid: u32,
    /// As `uid`.
    pub gid: u32,
    /// Discriminant of [`crate::Reason`].
    pub reason: u8,
    /// 6 or 17.
    pub protocol: u8,
    /// 1 for inbound.
    pub inbound: u8,
    /// Zero.
    pub reserved: u8,
    /// Name of the task, NUL padded; empty for inbound.
    pub comm: [u8; 16],
    /// Zero.
    pub reserved2: u32,
}

const _: () = {
    assert!(size_of::<PodPolicy>() == 32 + 8 * MAX_OWNERS);
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

    #[test]
    fn servers_are_found_by_number_until_they_give_way() {
        let mut servers = DnsServers { next: 0xfffa, ..DnsServers::zeroed() };
        let addr = |n: u32| Addr::from_v4((0x0a00_0000 + n).to_be());
        assert_eq!(servers.server(0xfff9), None, "nobody has been asked");
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
