//! What the programs cannot see of the pod's network: its interfaces, its routes, and the source address that a
//! route gives. Mirrored from netlink before the first attach, and followed after it.
//!
//! The routing decision is not made anew here. The prefixes of all routes (and of rules with `to`) cut the
//! addresses into ranges within which the kernel decides alike; for one address of each range the kernel is
//! asked. So rules, metrics, dead next hops and the like are what the kernel makes of them. What is asked is the
//! output route of an unbound, unmarked socket of root, therefore:
//! - rules that select by mark, user, protocol, port or source answer as for such a socket;
//! - of several next hops, the one for the address asked gives the source of all.
//!
//! Which of several IPv6 addresses is the source also depends on the destination's label, and on how many bits they have
//! in common (RFC 6724, rules 6 and 8): routes are cut further where that may change.

mod follow;
mod prefixes;
mod requests;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::RouteType;

use self::prefixes::Prefixes;
use self::requests::{ListedRoute, Requests, RoutesReply};
use crate::netns::{Netns, NetnsError};

pub use follow::Follower;

/// Most interfaces, rules and routes of a family that are read: a pod with more is refused, because it would cost the
/// agent as much memory and time as the pod likes.
pub const MAX_ENTRIES: usize = 1 << 14;
/// How long reading all of it may take.
const READ_TIME: Duration = Duration::from_secs(10);

/// What netlink said of one namespace at one time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RouteSnapshot {
    /// In ascending order of their indices.
    pub interfaces: Vec<Interface>,
    /// One a prefix, sorted by it. No prefix, no route.
    pub routes: Vec<Route>,
    /// The broadcast addresses, sorted.
    pub broadcasts: Vec<IpNet>,
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Unique within its namespace.
    pub index: u32,
    /// As `ip link` shows it.
    pub name: String,
    /// The loopback interface of the namespace.
    pub loopback: bool,
    /// Set up by the administrator.
    pub up: bool,
}

/// What the kernel does with destinations in a prefix that are in no longer one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Host bits cleared.
    pub prefix: IpNet,
    /// Where it leads.
    pub reach: Reach,
    /// The interfaces of its other next hops, of which the kernel takes one by a hash of the connection. Sorted.
    pub others: Vec<u32>,
    /// The source of an unbound socket; `None` when there is no one address for the whole prefix: because there is
    /// none at all, or because a local prefix gives each destination itself.
    pub source: Option<IpAddr>,
}

/// Where a route leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Through the loopback interface: the pod's own addresses among others.
    Local,
    /// Through the interface of this index.
    Via(u32),
    /// Nowhere: unreachable, prohibited, or thrown away.
    None,
}

/// Why the snapshot could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RoutesError {
    /// The namespace cannot be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// Netlink cannot be spoken to, or said no.
    #[error("{attempt} by netlink in network namespace {netns}")]
    Netlink {
        /// What was attempted.
        attempt: &'static str,
        /// Path of the namespace.
        netns: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// There are more of them than are read.
    #[error("{attempt} of network namespace {netns}: it has {found}, and may have {limit}")]
    TooMany {
        /// What was attempted.
        attempt: &'static str,
        /// Path of the namespace.
        netns: String,
        /// How many there are.
        found: usize,
        /// How many there may be.
        limit: usize,
    },
    /// Reading took too long, and was given up.
    #[error("{attempt} in network namespace {netns}: given up after {} s", READ_TIME.as_secs())]
    Slow {
        /// What was attempted.
        attempt: &'static str,
        /// Path of the namespace.
        netns: String,
    },
    /// Interfaces or routes changed each time while they were read.
    #[error("{attempt} in network namespace {netns}: they change faster than they can be read; try again")]
    Restless {
        /// What was attempted.
        attempt: &'static str,
        /// Path of the namespace.
        netns: String,
    },
}

impl RouteSnapshot {
    /// Reads `netns` as it is now.
    pub fn snapshot(netns: &Netns) -> Result<Self, RoutesError> {
        Self::read(&mut Requests::open(netns)?)
    }

    fn read(requests: &mut Requests) -> Result<Self, RoutesError> {
        requests.until(Instant::now() + READ_TIME);
        let mut interfaces = requests.links()?;
        interfaces.sort_by_key(|interface| interface.index);
        let mut snapshot = Self { interfaces, ..Self::default() };
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            snapshot.read_family(requests, family)?;
        }
        snapshot.routes.sort_by_key(|route| route.prefix);
        snapshot.broadcasts.sort();
        snapshot.broadcasts.dedup();
        Ok(snapshot)
    }

    fn read_family(&mut self, requests: &mut Requests, family: AddressFamily) -> Result<(), RoutesError> {
        let rules = requests.rules(family)?;
        let mut prefixes: BTreeSet<IpNet> = rules.destinations.into_iter().collect();
        // Broadcast and multicast are not for TCP: left out, but nothing inside them may stand for its
        // surroundings either.
        let mut holes = BTreeSet::new();
        let mut own = BTreeMap::<u32, BTreeSet<Ipv6Addr>>::new();
        let mut next_hops = BTreeMap::<IpNet, BTreeSet<u32>>::new();
        for ListedRoute { prefix, kind, table, egresses } in requests.routes(family)? {
            if matches!(kind, RouteType::Broadcast | RouteType::Multicast) {
                holes.insert(prefix);
                if kind == RouteType::Broadcast {
                    self.broadcasts.push(prefix);
                }
            } else if rules.tables.contains(table) {
                prefixes.insert(prefix);
                match (kind, prefix, egresses.as_slice()) {
                    // Those of the loopback interface are the source of nothing that leaves.
                    (RouteType::Local, IpNet::V6(net), [index])
                        if net.prefix_len() == 128 && !self.is_loopback(*index) =>
                    {
                        own.entry(*index).or_default().insert(net.addr());
                    }
                    (_, _, [_, _, ..]) => next_hops.entry(prefix).or_default().extend(egresses),
                    _ => {}
                }
            }
        }
        if prefixes.is_empty() {
            return Ok(());
        }
        let refinements = match family {
            AddressFamily::Inet6 => {
                // Only addresses of the interface by which a packet leaves compete (RFC 6724, rule 5).
                let closer = own.values().flat_map(prefixes::closer_to_one_of).collect();
                prefixes::labelled().union(&closer).copied().filter(|net| !prefixes.contains(net)).collect()
            }
            _ => BTreeSet::new(),
        };
        let space = Prefixes::new(prefixes.iter().chain(&holes).copied());
        for prefix in prefixes.difference(&holes) {
            let Some(address) = space.representative(prefix) else { continue };
            let Some(mut route) = self.resolve(requests, *prefix, address)? else { continue };
            if let (Reach::Via(one), Some(all)) = (route.reach, next_hops.get(prefix)) {
                route.others = all.iter().copied().filter(|index| *index != one).collect();
            }
            self.routes.push(route);
        }
        let space = Prefixes::new(prefixes.iter().chain(&holes).chain(&refinements).copied());
        for prefix in &refinements {
            let Some(address) = space.representative(prefix) else { continue };
            let Some(route) = self.resolve(requests, *prefix, address)? else { continue };
            let around = self.lookup(address);
            // Of several next hops another may have been taken.
            let egresses = around.map(|around| around.others.clone()).unwrap_or_default();
            let reach = around.map_or(Reach::None, |around| around.reach);
            let same_reach =
                reach == route.reach || matches!(route.reach, Reach::Via(index) if egresses.contains(&index));
            if !same_reach || around.and_then(|around| around.source) != route.source {
                let others = if same_reach { egresses } else { Vec::new() };
                self.routes.push(Route {
                    reach: if same_reach { reach } else { route.reach },
                    others,
                    ..route
                });
            }
        }
        Ok(())
    }

    /// What the kernel does with `address`, taken for all of `prefix`; `None` when it is not an address for TCP.
    fn resolve(
        &self,
        requests: &mut Requests,
        prefix: IpNet,
        address: IpAddr,
    ) -> Result<Option<Route>, RoutesError> {
        let (reach, source) = match requests.ask(address)? {
            RoutesReply::Refused => (Reach::None, None),
            RoutesReply::Route { kind: RouteType::Broadcast | RouteType::Multicast, .. } => return Ok(None),
            RoutesReply::Route { kind: RouteType::Local, source, .. } => (Reach::Local, source),
            RoutesReply::Route { egress: Some(index), source, .. } if self.is_loopback(index) => {
                (Reach::Local, source)
            }
            RoutesReply::Route { egress: Some(index), source, kind: RouteType::Unicast } => {
                (Reach::Via(index), source)
            }
            RoutesReply::Route { .. } => (Reach::None, None),
        };
        let own = reach == Reach::Local && source == Some(address) && IpNet::from(address) != prefix;
        let source = source.filter(|source| !own && !source.is_unspecified());
        Ok(Some(Route { prefix, reach, others: Vec::new(), source }))
    }

    fn is_loopback(&self, index: u32) -> bool {
        self.interface(index).is_some_and(|interface| interface.loopback)
    }

    /// The interface of an index.
    pub fn interface(&self, index: u32) -> Option<&Interface> {
        let at = self.interfaces.binary_search_by_key(&index, |interface| interface.index).ok()?;
        self.interfaces.get(at)
    }

    /// Whether all of a prefix is the namespace's own.
    pub fn is_local(&self, prefix: &IpNet) -> bool {
        let around = self.routes.iter().filter(|route| route.prefix.contains(prefix));
        around.max_by_key(|route| route.prefix.prefix_len()).is_some_and(|route| route.reach == Reach::Local)
            && self
                .routes
                .iter()
                .filter(|route| prefix.contains(&route.prefix))
                .all(|route| route.reach == Reach::Local)
    }

    /// The names of all interfaces.
    pub fn interface_names(&self) -> Vec<&str> {
        self.interfaces.iter().map(|interface| interface.name.as_str()).collect()
    }

    /// The same once all of a prefix is local, with 127.0.0.1 or ::1 as the source.
    #[must_use]
    pub fn with_local_prefix(mut self, prefix: IpNet) -> Self {
        let source = match prefix {
            IpNet::V4(_) => IpAddr::from(Ipv4Addr::LOCALHOST),
            IpNet::V6(_) => IpAddr::from(Ipv6Addr::LOCALHOST),
        };
        let route = Route { prefix, reach: Reach::Local, others: Vec::new(), source: Some(source) };
        match self.routes.binary_search_by_key(&prefix, |route| route.prefix) {
            Ok(at) => self.routes[at] = route,
            Err(at) => self.routes.insert(at, route),
        }
        self
    }

    /// The same once the loopback interface has another IPv6 address of global scope, a single one (/128): a local route
    /// leads to it, and it is the source where the kernel found none but a link-local one.
    #[must_use]
    pub fn with_loopback_address(mut self, address: IpAddr) -> Self {
        let prefix = IpNet::from(address);
        match self.routes.binary_search_by_key(&prefix, |route| route.prefix) {
            Ok(at) if self.routes[at].reach == Reach::Local => return self,
            Ok(at) => _ = self.routes.remove(at),
            Err(_) => {}
        }
        for route in &mut self.routes {
            let IpNet::V6(to) = route.prefix else { continue };
            let is_routed = matches!(route.reach, Reach::Via(_)) && !to.addr().is_unicast_link_local();
            if is_routed && route.source.is_none_or(|source| is_link_local(&source)) {
                route.source = Some(address);
            }
        }
        let at = self.routes.partition_point(|route| route.prefix < prefix);
        let route = Route { prefix, reach: Reach::Local, others: Vec::new(), source: Some(address) };
        self.routes.insert(at, route);
        self
    }

    /// The route of `address`; `None` when there is none. An IPv4 mapped address is an IPv4 one.
    pub fn lookup(&self, address: IpAddr) -> Option<&Route> {
        let address = address.to_canonical();
        let covering = self.routes.iter().filter(|route| route.prefix.contains(&address));
        covering.max_by_key(|route| route.prefix.prefix_len())
    }
}

fn is_link_local(source: &IpAddr) -> bool {
    matches!(source, IpAddr::V6(source) if source.is_unicast_link_local())
}

#[cfg(test)]
mod tests;
