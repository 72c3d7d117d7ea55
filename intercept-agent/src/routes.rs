//! The part of the pod's network that the programs cannot see: its interfaces, its routes, and the source address that
//! a route selects. It is read by netlink before the programs are attached, and followed afterwards.
//!
//! The routing decision is not reimplemented. The prefixes of all routes (and of rules with `to`) divide the
//! addresses into ranges for which the kernel decides alike, and the kernel is asked for one address of each. So rules,
//! metrics and dead next hops have the effect that they have in the kernel. The question is the output route of an
//! unbound, unmarked socket of root, therefore:
//! - rules that match on mark, user, protocol, port or source answer as for such a socket;
//! - of several next hops, the one for that address gives the source for all.
//!
//! The source among several IPv6 addresses also depends on the destination's label and on the length of the common
//! prefix (RFC 6724, rules 6 and 8). Routes are divided further where those may change it.

mod follow;
mod interfaces;
mod prefixes;
mod requests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::RouteType;

use self::prefixes::Prefixes;
use self::requests::{ListedRoute, Requests, RoutesReply};
use crate::netlink::Questions;
use crate::netns::{Netns, NetnsError};

pub use follow::{Follower, Subscription};
pub use requests::NetnsListing;

/// Most interfaces, rules and routes per family. A pod with more is refused, because it could otherwise cost the agent
/// any amount of memory and time.
pub const MAX_ENTRIES: usize = 1 << 14;
/// Time limit for one reading.
const READ_TIME: Duration = Duration::from_secs(10);

/// Interfaces and routes of a namespace at one point in time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RouteSnapshot {
    /// In ascending order of index.
    pub interfaces: Vec<Interface>,
    /// One per prefix, in ascending order. A prefix without one has no route.
    pub routes: Vec<Route>,
    /// The broadcast addresses, in ascending order.
    pub broadcasts: Vec<IpNet>,
}

/// A snapshot, what else was read for it, and the socket by which it was read.
pub struct RouteReading {
    /// The snapshot.
    pub snapshot: RouteSnapshot,
    /// What else the kernel has listed.
    pub listed: NetnsListing,
    /// The socket.
    pub socket: RouteSocket,
}

impl RouteReading {
    /// Reads the current state of `netns`.
    pub fn of(netns: &Netns) -> Result<Self, RoutesError> {
        let mut requests = Requests::open(netns)?;
        let (snapshot, listed) = RouteSnapshot::read(&mut requests)?;
        Ok(Self { snapshot, listed, socket: RouteSocket::new(requests) })
    }
}

/// A netlink socket in a namespace, for its routes, rules and addresses.
#[derive(Clone)]
pub struct RouteSocket(Arc<Mutex<Requests>>);

impl RouteSocket {
    fn new(requests: Requests) -> Self {
        Self(Arc::new(Mutex::new(requests)))
    }

    /// Poisoning is harmless: after a panic no partial answer remains that could be taken for a later one.
    fn requests(&self) -> MutexGuard<'_, Requests> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the kernel delivers packets to this address in the namespace.
    pub(crate) fn is_local(&self, address: IpAddr) -> Result<bool, RoutesError> {
        let mut requests = self.requests();
        requests.until(Instant::now() + READ_TIME);
        Ok(matches!(requests.ask(address)?, RoutesReply::Route { kind: RouteType::Local, .. }))
    }

    /// Uses the socket for other requests.
    pub(crate) fn with<T>(&self, work: impl FnOnce(&mut Questions) -> T) -> T {
        let mut requests = self.requests();
        requests.until(Instant::now() + READ_TIME);
        work(&mut requests.questions)
    }
}

impl fmt::Debug for RouteSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RouteSocket").finish_non_exhaustive()
    }
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Unique within the namespace.
    pub index: u32,
    /// As in `ip link`.
    pub name: String,
    /// Whether it is the loopback interface.
    pub loopback: bool,
    /// Whether the administrator has set it up (IFF_UP).
    pub up: bool,
}

/// What the kernel does with the destinations in a prefix that are in no longer prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Host bits cleared.
    pub prefix: IpNet,
    /// The kind of egress.
    pub reach: Reach,
    /// Interfaces of further next hops, in ascending order. The kernel selects one by a hash of the connection.
    pub others: Vec<u32>,
    /// The source address of an unbound socket. `None` if the prefix has no single source: either it has none, or a
    /// local prefix makes each destination its own source.
    pub source: Option<IpAddr>,
}

/// The egress of a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Through the loopback interface, as for the pod's own addresses.
    Local,
    /// Through the interface with this index.
    Via(u32),
    /// None: the route is unreachable, prohibit or blackhole.
    None,
}

/// Why a snapshot cannot be taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RoutesError {
    /// The namespace cannot be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// A netlink socket cannot be opened, or a request has failed.
    #[error("{attempt} by netlink in network namespace {netns}")]
    Netlink {
        /// The operation.
        attempt: &'static str,
        /// Path of the namespace.
        netns: String,
        /// The error from the kernel.
        source: io::Error,
    },
    /// There are more entries than [`MAX_ENTRIES`].
    #[error("{attempt} of network namespace {netns}: there are {found}, and at most {limit} are supported")]
    TooMany {
        /// The operation.
        attempt: &'static str,
        /// Path of the namespace.
        netns: String,
        /// Number of entries.
        found: usize,
        /// Most entries.
        limit: usize,
    },
    /// Reading exceeded its time limit.
    #[error("{attempt} in network namespace {netns}: timed out after {} s", READ_TIME.as_secs())]
    Slow {
        /// The operation.
        attempt: &'static str,
        /// Path of the namespace.
        netns: String,
    },
    /// The interfaces or routes changed during every attempt to read them.
    #[error("{attempt} in network namespace {netns}: they change faster than they can be read; try again")]
    Restless {
        /// The operation.
        attempt: &'static str,
        /// Path of the namespace.
        netns: String,
    },
}

/// What the rules and routes of a family name.
#[derive(Default)]
struct FamilyPrefixes {
    prefixes: BTreeSet<IpNet>,
    /// Broadcast and multicast are not for TCP and get no route. They still divide the space, so that no address in them
    /// represents the prefix around it.
    holes: BTreeSet<IpNet>,
    /// The pod's own IPv6 addresses by interface. An address of the loopback interface is never the source of a packet
    /// that leaves.
    own: BTreeMap<u32, BTreeSet<Ipv6Addr>>,
    /// The interfaces of routes with several next hops.
    next_hops: BTreeMap<IpNet, BTreeSet<u32>>,
}

impl RouteSnapshot {
    /// Reads the current state of `netns`.
    pub fn snapshot(netns: &Netns) -> Result<Self, RoutesError> {
        Ok(RouteReading::of(netns)?.snapshot)
    }

    fn read(requests: &mut Requests) -> Result<(Self, NetnsListing), RoutesError> {
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
        Ok((snapshot, std::mem::take(&mut requests.listed)))
    }

    fn read_family(&mut self, requests: &mut Requests, family: AddressFamily) -> Result<(), RoutesError> {
        let FamilyPrefixes { prefixes, holes, own, next_hops } = self.list_prefixes(requests, family)?;
        if prefixes.is_empty() {
            return Ok(());
        }
        let space = Prefixes::new(prefixes.iter().chain(&holes).copied());
        for prefix in prefixes.difference(&holes) {
            let Some(address) = space.representative(prefix) else { continue };
            let Some(mut route) = self.resolve(requests, *prefix, address)? else { continue };
            if let (Reach::Via(one), Some(all)) = (route.reach, next_hops.get(prefix)) {
                route.others = all.iter().copied().filter(|index| *index != one).collect();
            }
            self.routes.push(route);
        }
        let refinements: BTreeSet<IpNet> = match family {
            AddressFamily::Inet6 => {
                // Only addresses of the outgoing interface compete (RFC 6724, rule 5).
                let closer = own.values().flat_map(prefixes::closer_to_one_of).collect();
                prefixes::labelled().union(&closer).copied().filter(|net| !prefixes.contains(net)).collect()
            }
            _ => BTreeSet::new(),
        };
        let space = Prefixes::new(prefixes.iter().chain(&holes).chain(&refinements).copied());
        for prefix in &refinements {
            let Some(address) = space.representative(prefix) else { continue };
            let Some(route) = self.resolve(requests, *prefix, address)? else { continue };
            self.refine(route, address);
        }
        Ok(())
    }

    /// Reads which prefixes the rules and routes of a family name.
    fn list_prefixes(
        &mut self,
        requests: &mut Requests,
        family: AddressFamily,
    ) -> Result<FamilyPrefixes, RoutesError> {
        let rules = requests.rules(family)?;
        let mut found =
            FamilyPrefixes { prefixes: rules.destinations.into_iter().collect(), ..Default::default() };
        for ListedRoute { prefix, kind, table, egresses } in requests.routes(family)? {
            if matches!(kind, RouteType::Broadcast | RouteType::Multicast) {
                found.holes.insert(prefix);
                if kind == RouteType::Broadcast {
                    self.broadcasts.push(prefix);
                }
            } else if rules.tables.contains(table) {
                found.prefixes.insert(prefix);
                match (kind, prefix, egresses.as_slice()) {
                    (RouteType::Local, IpNet::V6(net), [index])
                        if net.prefix_len() == 128 && !self.is_loopback(*index) =>
                    {
                        found.own.entry(*index).or_default().insert(net.addr());
                    }
                    (_, _, [_, _, ..]) => found.next_hops.entry(prefix).or_default().extend(egresses),
                    _ => {}
                }
            }
        }
        Ok(found)
    }

    /// Adds the route of a prefix inside another one, if it differs from the route around it.
    fn refine(&mut self, route: Route, address: IpAddr) {
        let around = self.lookup(address);
        // The kernel may have selected another of several next hops.
        let egresses = around.map(|around| around.others.clone()).unwrap_or_default();
        let reach = around.map_or(Reach::None, |around| around.reach);
        let same_reach =
            reach == route.reach || matches!(route.reach, Reach::Via(index) if egresses.contains(&index));
        if !same_reach || around.and_then(|around| around.source) != route.source {
            let others = if same_reach { egresses } else { Vec::new() };
            self.routes.push(Route { reach: if same_reach { reach } else { route.reach }, others, ..route });
        }
    }

    /// Asks the kernel about `address` and applies the answer to all of `prefix`. `None` for broadcast and multicast.
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

    /// Returns the interface with an index.
    pub fn interface(&self, index: u32) -> Option<&Interface> {
        let at = self.interfaces.binary_search_by_key(&index, |interface| interface.index).ok()?;
        self.interfaces.get(at)
    }

    /// Whether every address of a prefix is local.
    pub fn is_local(&self, prefix: &IpNet) -> bool {
        let around = self.routes.iter().filter(|route| route.prefix.contains(prefix));
        around.max_by_key(|route| route.prefix.prefix_len()).is_some_and(|route| route.reach == Reach::Local)
            && self
                .routes
                .iter()
                .filter(|route| prefix.contains(&route.prefix))
                .all(|route| route.reach == Reach::Local)
    }

    /// Returns the names of all interfaces.
    pub fn interface_names(&self) -> Vec<&str> {
        self.interfaces.iter().map(|interface| interface.name.as_str()).collect()
    }

    /// Returns the snapshot with all of `prefix` local, and 127.0.0.1 or ::1 as its source.
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

    /// Returns the snapshot with another global IPv6 address, a /128, on the loopback interface: it has a local route,
    /// and is the source where the kernel found only a link-local one or none.
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

    /// Returns the route for `address`, or `None`. An IPv4-mapped address counts as IPv4.
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
