//! Compiles the options of a pod and the route snapshot of its namespace into map entries.
//!
//! The programs look up a destination once, by longest prefix. So each prefix of a list or route becomes one entry
//! that also contains what the prefixes around it contribute: the bits of all lists, and the longest route. A prefix
//! with the value of the entry around it gets no entry.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use intercept_common::{
    Addr, PolicyId, Slot,
    layout::{Destination, MAX_CONTAINERS, MAX_OWNERS, PodPolicy, destination, interface, policy, port},
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::{
    options::{Config, Dns, InboundMode, InboundPorts, OwnerGroups, Ports},
    routes::{Interface, Reach, Route, RouteSnapshot},
    userns::{IdMap, IdMaps},
};

/// The entries of a policy in the maps that all pods share.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entries {
    /// Prefix length (of 128; IPv4 is mapped), address and value, sorted by prefix.
    pub destinations: Vec<(u32, Addr, Destination)>,
    /// Disjoint prefixes of ports in ascending order. If there are any, the first is port 0 alone, with no bits.
    pub ports: Vec<PortPrefix>,
    /// Gids of the owner groups.
    pub groups: BTreeMap<u32, u32>,
    /// Bits of `layout::interface`, by interface index.
    pub interfaces: BTreeMap<u32, u32>,
}

/// The ports that share their first `len` bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PortPrefix {
    /// Prefix length in bits, at most 16.
    pub len: u32,
    /// The first port.
    pub port: u16,
    /// Bits of `layout::port`.
    pub bits: u32,
}

impl PortPrefix {
    /// Splits the range `first..=last` into the fewest prefixes.
    fn of_range(first: u32, last: u32, bits: u32) -> impl Iterator<Item = Self> {
        let mut next = first;
        std::iter::from_fn(move || {
            let left = (last + 1).checked_sub(next).filter(|left| *left > 0)?;
            // The largest prefix that starts at `next` and fits into the rest.
            let size_bits = next.trailing_zeros().min(left.ilog2()).min(16);
            let prefix = Self { len: 16 - size_bits, port: u16::try_from(next).ok()?, bits };
            next += 1 << size_bits;
            Some(prefix)
        })
    }

    /// Whether the prefix contains a port.
    pub fn contains(&self, port: u16) -> bool {
        (u32::from(port) ^ u32::from(self.port)) >> (16 - self.len) == 0
    }
}

/// A pod's policy without id and slot, with its entries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compiled {
    /// `id`, `slot` and `max_connections` are zero.
    pub policy: PodPolicy,
    /// The entries under the policy's id.
    pub entries: Entries,
}

impl Compiled {
    /// Returns a hash of the policy and its entries. Equal policies have equal hashes within one build of the agent.
    pub fn digest(&self) -> u64 {
        use std::hash::{Hash as _, Hasher as _};
        let mut hasher = std::hash::DefaultHasher::new();
        bytemuck::bytes_of(&self.policy).hash(&mut hasher);
        for (len, addr, value) in &self.entries.destinations {
            (len, addr, bytemuck::bytes_of(value)).hash(&mut hasher);
        }
        (&self.entries.ports, &self.entries.groups, &self.entries.interfaces).hash(&mut hasher);
        hasher.finish()
    }
}

/// Compiles `config`, whose ids are those of the initial user namespace.
pub fn compile(config: &Config, snapshot: &RouteSnapshot) -> Compiled {
    let entries = Entries {
        destinations: destinations(config, snapshot),
        ports: ports(config),
        groups: match &config.owner_groups {
            OwnerGroups::All => BTreeMap::new(),
            OwnerGroups::Only(gids) | OwnerGroups::Except(gids) => gids.iter().map(|&gid| (gid, 1)).collect(),
        },
        interfaces: interfaces(config, snapshot),
    };
    let (uids, uid_count) = owners(&config.proxy_uids);
    let (gids, gid_count) = owners(&config.proxy_gids);
    let policy = PodPolicy {
        id: PolicyId(0),
        slot: Slot(0),
        flags: flags(config) | local_prefixes(snapshot),
        outbound_port: config.proxy_port,
        inbound_port: config.inbound_port,
        tunnel_port: config.tunnel_port,
        dns_port: config.dns_port,
        tproxy_mark: if config.mode == InboundMode::Tproxy { config.tproxy_mark } else { 0 },
        max_connections: 0,
        uid_count,
        gid_count,
        uids,
        gids,
        // Entered from the cgroups that are there (`containers`).
        cgroup_level: 0,
        zero: 0,
        cgroup_ids: [0; MAX_CONTAINERS],
        cgroup_kinds: [0; MAX_CONTAINERS],
        expires_at: 0,
    };
    Compiled { policy, entries }
}

/// Returns `config` with ids of the initial user namespace, and the ids without a mapping. Those keep their place in
/// the lists as an id that no socket has, because a row "owner is not U" then matches every socket.
pub fn outside(config: &Config, maps: &IdMaps) -> (Config, Vec<u32>) {
    /// Neither a valid id nor (uid_t)-1, which stands for no user.
    const NOBODY: u32 = u32::MAX - 1;
    let mut nobody = Vec::new();
    let mut translate = |map: &IdMap, ids: &mut Vec<u32>| {
        for id in ids {
            *id = map.outside(*id).unwrap_or_else(|| {
                nobody.push(*id);
                NOBODY
            });
        }
    };
    let mut config = config.clone();
    translate(&maps.users, &mut config.proxy_uids);
    translate(&maps.groups, &mut config.proxy_gids);
    if let OwnerGroups::Only(gids) | OwnerGroups::Except(gids) = &mut config.owner_groups {
        translate(&maps.groups, gids);
    }
    (config, nobody)
}

/// The parser refuses lists longer than `MAX_OWNERS`.
fn owners(ids: &[u32]) -> ([u32; MAX_OWNERS], u16) {
    let mut owners = [ids.first().copied().unwrap_or(0); MAX_OWNERS];
    let mut count = 0;
    for (slot, &id) in owners.iter_mut().zip(ids) {
        *slot = id;
        count += 1;
    }
    (owners, count)
}

/// Returns the flags of a policy that follow from its options.
pub fn flags(config: &Config) -> u32 {
    let mut flags = 0;
    let mut set = |when: bool, bit: u32| {
        if when {
            flags |= bit;
        }
    };
    set(config.mode == InboundMode::Tproxy, policy::TPROXY);
    set(config.inbound_ports == InboundPorts::All, policy::INBOUND_ALL);
    set(
        !config.inbound_exclude.is_empty()
            || matches!(&config.inbound_ports, InboundPorts::Only(list) if !list.is_empty()),
        policy::INBOUND_PORTS,
    );
    set(
        !config.outbound_ports.is_empty() || !config.outbound_exclude_ports.is_empty(),
        policy::OUTBOUND_PORTS,
    );
    set(config.include.loopback, policy::INCLUDES_LOOPBACK);
    set(config.open_without_proxy, policy::OPEN_WITHOUT_PROXY);
    set(config.without_ipv6, policy::WITHOUT_IPV6);
    let tells_proxy = !config.proxy_cgroups.is_empty() || !config.proxy_containers.is_empty();
    let exempts = !config.exempt_cgroups.is_empty() || !config.exempt_containers.is_empty();
    set(tells_proxy || exempts, policy::CONTAINERS);
    set(tells_proxy, policy::PROXY_CONTAINER);
    set(config.shadow, policy::SHADOW);
    set(config.without_self_capture, policy::WITHOUT_SELF_CAPTURE);
    set(config.dns != Dns::Off, policy::DNS);
    set(config.dns != Dns::Off && config.dns_over_udp_only, policy::DNS_UDP_ONLY);
    set(config.dns == Dns::All, policy::DNS_ALL);
    set(matches!(config.owner_groups, OwnerGroups::Only(_)), policy::GROUPS_ONLY);
    set(matches!(config.owner_groups, OwnerGroups::Except(_)), policy::GROUPS_EXCEPT);
    set(!config.exclude_interfaces.is_empty() || !config.virt_interfaces.is_empty(), policy::INTERFACES);
    flags
}

/// The flags for those of the programs' own address prefixes that are local in the namespace.
fn local_prefixes(snapshot: &RouteSnapshot) -> u32 {
    let v4 = |(net, len): (Ipv4Addr, u8)| IpNet::V4(Ipv4Net::new_assert(net, len));
    let mut flags = 0;
    if Addr::STAND_IN_PREFIXES_V4.map(v4).iter().all(|net| snapshot.is_local(net)) {
        flags |= policy::STAND_IN_V4;
    }
    if snapshot.is_local(&v4(Addr::NUMBERED_PREFIX_V4)) {
        flags |= policy::NUMBERED_V4;
    }
    let (net, len) = Addr::STAND_IN_PREFIX_V6;
    if snapshot.is_local(&IpNet::V6(Ipv6Net::new_assert(net, len))) {
        flags |= policy::STAND_IN_V6;
    }
    flags
}

fn ports(config: &Config) -> Vec<PortPrefix> {
    // The bits that change at each port. XOR works because the ranges of one list neither touch nor overlap.
    let mut edges = BTreeMap::<u32, u32>::new();
    let mut add = |list: &Ports, bit: u32| {
        for range in list.ranges() {
            *edges.entry(u32::from(*range.start())).or_default() ^= bit;
            *edges.entry(u32::from(*range.end()) + 1).or_default() ^= bit;
        }
    };
    if let InboundPorts::Only(list) = &config.inbound_ports {
        add(list, port::INBOUND);
    }
    add(&config.inbound_exclude, port::INBOUND_EXCLUDED);
    add(&config.outbound_ports, port::OUTBOUND);
    add(&config.outbound_exclude_ports, port::OUTBOUND_EXCLUDED);
    if edges.is_empty() {
        return Vec::new();
    }
    let mut prefixes = vec![PortPrefix { len: 16, port: 0, bits: 0 }];
    let mut bits = 0;
    let ends = edges.keys().skip(1).copied().chain([1 << 16]);
    for ((&start, &change), end) in edges.iter().zip(ends) {
        bits ^= change;
        if bits != 0 {
            prefixes.extend(PortPrefix::of_range(start, end - 1, bits));
        }
    }
    prefixes
}

fn interfaces(config: &Config, snapshot: &RouteSnapshot) -> BTreeMap<u32, u32> {
    let named = |list: &[crate::options::InterfacePattern], name: &str| list.iter().any(|i| i.matches(name));
    snapshot
        .interfaces
        .iter()
        .filter_map(|i| {
            let mut bits = 0;
            if named(&config.exclude_interfaces, &i.name) {
                bits |= interface::EXCLUDED;
            }
            if named(&config.virt_interfaces, &i.name) {
                bits |= interface::VIRT;
            }
            (bits != 0).then_some((i.index, bits))
        })
        .collect()
}

/// The first entry of a policy, from which the others are enumerated (`maps`).
const FIRST: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 128);

/// What a prefix of a list or route contributes to the addresses in it.
enum PrefixEffect<'a> {
    Bits(u32),
    Route(&'a Route),
}

/// The prefixes of all lists and routes, unordered.
fn effects<'a>(config: &Config, snapshot: &'a RouteSnapshot) -> Vec<(IpNet, PrefixEffect<'a>)> {
    let everything = [IpNet::V4(Ipv4Net::default()), IpNet::V6(Ipv6Net::default())];
    // IPv4 is a prefix of IPv6 in the map. Without an entry for all of IPv4, its addresses would match ::/0.
    let mut said: Vec<(IpNet, PrefixEffect<'a>)> =
        vec![(IpNet::V4(Ipv4Net::default()), PrefixEffect::Bits(0))];
    said.push((FIRST.into(), PrefixEffect::Bits(0)));
    said.extend(snapshot.routes.iter().map(|route| (route.prefix, PrefixEffect::Route(route))));
    if config.include.all {
        said.extend(everything.map(|net| (net, PrefixEffect::Bits(destination::INCLUDED))));
    }
    said.extend(config.include.list.iter().map(|&net| (net, PrefixEffect::Bits(destination::INCLUDED))));
    said.extend(config.exclude.iter().map(|&net| (net, PrefixEffect::Bits(destination::EXCLUDED))));
    let sources = config.exclude_sources.iter();
    said.extend(sources.map(|&net| (net, PrefixEffect::Bits(destination::EXCLUDED_SOURCE))));
    said.push((config.loopback_v4.into(), PrefixEffect::Bits(destination::LOCALHOST)));
    said.push((IpNet::from(IpAddr::from(Ipv6Addr::LOCALHOST)), PrefixEffect::Bits(destination::LOCALHOST)));
    said.extend(groups().map(|net| (net, PrefixEffect::Bits(destination::GROUP))));
    said.extend(snapshot.broadcasts.iter().map(|&net| (net, PrefixEffect::Bits(destination::GROUP))));
    if let Dns::Resolvers(servers) = &config.dns {
        said.extend(
            servers.iter().map(|&server| (IpNet::from(server), PrefixEffect::Bits(destination::RESOLVER))),
        );
    }
    said
}

fn destinations(config: &Config, snapshot: &RouteSnapshot) -> Vec<(u32, Addr, Destination)> {
    let mut said = effects(config, snapshot);
    // Outer prefixes come first, so that the prefixes around each one are on the stack.
    said.sort_by_key(|(net, _)| (net.network(), net.prefix_len()));

    let mut entries: Vec<(u32, Addr, Destination)> = Vec::new();
    let mut around: Vec<Prefix<'_>> = Vec::new();
    for (net, says) in &said {
        while around.last().is_some_and(|outer| !outer.net.contains(net)) {
            around.pop();
        }
        let (mut bits, mut route) = around.last().map_or((0, None), |outer| (outer.bits, outer.route));
        match says {
            PrefixEffect::Bits(more) => bits |= more,
            PrefixEffect::Route(own) => route = Some(*own),
        }
        if around.last().is_some_and(|outer| outer.net == *net)
            && let Some(same) = around.pop()
            && same.has_entry
        {
            entries.pop();
        }
        let value = destination_of(bits, route, config, snapshot);
        let has_entry = match (around.last(), net) {
            _ if *net == IpNet::from(FIRST) => true,
            (Some(outer), _) => outer.value != value,
            (None, IpNet::V4(_)) => true,
            (None, IpNet::V6(_)) => value != Destination { flags: 0, source: Addr::UNSPECIFIED },
        };
        if has_entry {
            let (len, addr) = mapped(*net);
            entries.push((len, addr, value));
        }
        around.push(Prefix { net: *net, bits, route, value, has_entry });
    }
    entries
}

/// Addresses that several hosts share: multicast and the limited broadcast address.
fn groups() -> [IpNet; 3] {
    [
        Ipv4Net::new_assert(Ipv4Addr::new(224, 0, 0, 0), 4).into(),
        IpNet::from(IpAddr::from(Ipv4Addr::BROADCAST)),
        Ipv6Net::new_assert(Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0), 8).into(),
    ]
}

/// A prefix with its own contribution and those of the prefixes around it.
struct Prefix<'a> {
    net: IpNet,
    bits: u32,
    route: Option<&'a Route>,
    value: Destination,
    /// False if the entry around it has the same value.
    has_entry: bool,
}

fn destination_of(
    bits: u32,
    route: Option<&Route>,
    config: &Config,
    snapshot: &RouteSnapshot,
) -> Destination {
    let mut flags = bits;
    let mut source = Addr::UNSPECIFIED;
    if let Some(route) = route {
        let egress = match route.reach {
            Reach::Local => snapshot.interfaces.iter().find(|i| i.loopback),
            Reach::Via(index) => snapshot.interface(index),
            Reach::None => None,
        };
        if route.reach != Reach::None {
            flags |= destination::ROUTED;
            source = route.source.map_or(Addr::UNSPECIFIED, Addr::from);
        }
        if route.reach == Reach::Local || egress.is_some_and(|i| i.loopback) {
            flags |= destination::LO;
        }
        // If only some next hops use an interface of -c, iptables decides per connection, by the hash that selects the
        // next hop. Here all of these connections are captured.
        let excludes = |i: &Interface| config.exclude_interfaces.iter().any(|named| named.matches(&i.name));
        let others = route.others.iter().filter_map(|index| snapshot.interface(*index));
        if egress.is_some_and(excludes) && others.into_iter().all(excludes) {
            flags |= destination::EXCLUDED_EGRESS;
        }
    }
    Destination { flags, source }
}

fn mapped(net: IpNet) -> (u32, Addr) {
    match net {
        IpNet::V4(net) => (96 + u32::from(net.prefix_len()), net.network().into()),
        IpNet::V6(net) => (net.prefix_len().into(), net.network().into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::Cidrs;

    fn found(prefixes: &[PortPrefix], port: u16) -> u32 {
        let mut covering = prefixes.iter().filter(|prefix| prefix.contains(port));
        let bits = covering.next().map_or(0, |prefix| prefix.bits);
        assert!(covering.next().is_none(), "{port} is in two of {prefixes:?}");
        bits
    }

    #[test]
    fn ranges_of_ports_become_the_prefixes_that_make_them() {
        for (inbound, outbound, most) in [
            (vec![], vec![], 0),
            (vec![1..=65535], vec![], 17),
            (vec![1..=65535], vec![1..=65535], 17),
            (vec![2..=65534], vec![1..=65535], 40),
            (vec![80..=80, 8000..=9000], vec![443..=443, 8500..=8600, 65535..=65535], 40),
            (vec![32768..=65535], vec![1..=32767], 17),
        ] {
            let (inbound, outbound): (Ports, Ports) =
                (inbound.into_iter().collect(), outbound.into_iter().collect());
            let config = Config {
                inbound_ports: InboundPorts::All,
                inbound_exclude: inbound.clone(),
                outbound_exclude_ports: outbound.clone(),
                ..Config::default()
            };
            let prefixes = ports(&config);
            assert!(prefixes.len() <= most, "{} for {inbound} and {outbound}", prefixes.len());
            for number in 0..=u16::MAX {
                let mut bits = 0;
                if inbound.contains(number) {
                    bits |= port::INBOUND_EXCLUDED;
                }
                if outbound.contains(number) {
                    bits |= port::OUTBOUND_EXCLUDED;
                }
                assert_eq!(found(&prefixes, number), bits, "{number} of {inbound} and {outbound}");
            }
        }
    }

    #[test]
    fn what_says_no_more_than_what_is_around_it_takes_no_room() {
        let net = |text: &str| text.parse::<IpNet>().expect("a prefix");
        let route =
            |prefix: &str, reach| Route { prefix: net(prefix), reach, others: Vec::new(), source: None };
        let snapshot = RouteSnapshot {
            broadcasts: Vec::new(),
            interfaces: Vec::new(),
            routes: vec![
                route("0.0.0.0/0", Reach::Via(2)),
                route("10.0.0.0/8", Reach::Via(2)),
                route("10.1.0.0/16", Reach::None),
                route("10.1.2.0/24", Reach::Via(2)),
                route("10.1.2.128/25", Reach::Via(2)),
                route("::/0", Reach::None),
                route("2001:db8::/32", Reach::None),
            ],
        };
        let config = Config {
            include: Cidrs { all: false, list: vec![net("10.0.0.0/9")], loopback: false },
            exclude: vec![net("10.1.2.0/24")],
            ..Config::default()
        };
        let entries = compile(&config, &snapshot).entries.destinations;
        let shown: Vec<_> = entries.iter().map(|(len, addr, _)| format!("{addr:?}/{len}")).collect();
        let lens: Vec<u32> = entries.iter().map(|(len, ..)| *len).collect();
        // All of IPv4, the list, the unreachable route, the excluded prefix, localhost, two groups; then the first
        // entry, ::1, groups.
        assert_eq!(lens, [96, 96 + 9, 96 + 16, 96 + 24, 128, 96 + 4, 128, 128, 128, 8], "{shown:?}");
    }
}
