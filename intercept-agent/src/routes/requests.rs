//! Netlink requests for interfaces, rules and routes.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Instant;

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable};
use netlink_packet_route::link::{LinkAttribute, LinkExtentMask, LinkMessage};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;

use super::{Interface, MAX_ENTRIES, RoutesError, interfaces::InterfaceReply};
use crate::{netlink::Questions, netns::Netns};

/// Number of a routing table.
pub(super) type TableId = u32;

/// Attempts to read a list that changes while it is read.
const ATTEMPTS: usize = 16;

/// A netlink socket in one namespace.
pub(super) struct Requests {
    pub(super) questions: Questions,
    netns: String,
    /// What was listed since it was taken last.
    pub(super) listed: NetnsListing,
}

/// What the kernel has listed for a snapshot, and is not in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetnsListing {
    /// The rules of IPv4 and of IPv6; empty on a kernel without rules.
    pub rules: [Vec<RuleMessage>; 2],
    /// Whether IPv6 is enabled on the loopback interface.
    pub has_v6: bool,
}

/// The kernel's answer for one destination.
pub(super) enum RoutesReply {
    /// There is no route, or the route rejects packets.
    Refused,
    /// It is routed.
    Route {
        /// The type of the route.
        kind: RouteType,
        /// Index of the outgoing interface.
        egress: Option<u32>,
        /// The source address of an unbound socket.
        source: Option<IpAddr>,
    },
}

/// The relevant content of one family's rules.
pub(super) struct RuleTables {
    /// The tables that the rules name.
    pub(super) tables: TableSet,
    /// The prefixes of rules with `to`.
    pub(super) destinations: Vec<IpNet>,
}

/// Routing tables.
pub(super) enum TableSet {
    /// These tables.
    Some(BTreeSet<TableId>),
    /// Possibly any table.
    All,
}

impl TableSet {
    pub(super) fn contains(&self, table: TableId) -> bool {
        match self {
            Self::Some(tables) => tables.contains(&table),
            Self::All => true,
        }
    }
}

/// A route as the kernel lists it.
pub(super) struct ListedRoute {
    pub(super) prefix: IpNet,
    pub(super) kind: RouteType,
    pub(super) table: TableId,
    /// The interfaces of its next hops.
    pub(super) egresses: Vec<u32>,
}

impl Requests {
    pub(super) fn open(netns: &Netns) -> Result<Self, RoutesError> {
        let netlink = |source| RoutesError::Netlink {
            attempt: "opening a socket for questions",
            netns: netns.name().to_owned(),
            source,
        };
        let questions = Questions::open(netns, NETLINK_ROUTE)?.map_err(netlink)?;
        Ok(Self { questions, netns: netns.name().to_owned(), listed: NetnsListing::default() })
    }

    /// Sets the time at which readings are given up.
    pub(super) fn until(&mut self, deadline: Instant) {
        self.questions.until(deadline);
    }

    pub(super) fn links(&mut self) -> Result<Vec<Interface>, RoutesError> {
        let mut link = LinkMessage::default();
        // They are most of an answer, and added up over all processors.
        link.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        let question = RouteNetlinkMessage::GetLink(link);
        let found: Vec<InterfaceReply> = self.list("reading the interfaces", question, Some)?;
        self.listed.has_v6 = found.iter().any(|reply| reply.is_loopback_v6);
        Ok(found.into_iter().map(|reply| reply.interface).collect())
    }

    pub(super) fn rules(&mut self, family: AddressFamily) -> Result<RuleTables, RoutesError> {
        let mut question = RuleMessage::default();
        question.header.family = family;
        let rule = |message| match message {
            RouteNetlinkMessage::NewRule(rule) => Some(rule),
            _ => None,
        };
        let question = RouteNetlinkMessage::GetRule(question);
        let found = match self.list("reading the routing rules", question, rule) {
            Ok(found) => found,
            // A kernel without CONFIG_IP_MULTIPLE_TABLES has no rules.
            Err(RoutesError::Netlink { source, .. }) if source.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                return Ok(RuleTables { tables: TableSet::All, destinations: Vec::new() });
            }
            Err(error) => return Err(error),
        };
        let (mut tables, mut by_interface, mut destinations) = (BTreeSet::new(), false, Vec::new());
        for rule in &found {
            if rule.header.family != family {
                continue;
            }
            let mut table = TableId::from(rule.header.table);
            for attribute in &rule.attributes {
                match attribute {
                    RuleAttribute::Table(number) => table = *number,
                    // The rule looks up the table of the interface's VRF.
                    RuleAttribute::L3MDev(l3mdev) => by_interface |= *l3mdev,
                    RuleAttribute::Destination(address) => {
                        destinations.extend(IpNet::new(*address, rule.header.dst_len).map(|net| net.trunc()));
                    }
                    _ => {}
                }
            }
            if rule.header.action == RuleAction::ToTable {
                tables.insert(table);
            }
        }
        self.listed.rules[usize::from(family == AddressFamily::Inet6)] = found;
        let tables = if by_interface { TableSet::All } else { TableSet::Some(tables) };
        Ok(RuleTables { tables, destinations })
    }

    pub(super) fn routes(&mut self, family: AddressFamily) -> Result<Vec<ListedRoute>, RoutesError> {
        let mut question = RouteMessage::default();
        question.header.address_family = family;
        let route = |message| {
            let RouteNetlinkMessage::NewRoute(route) = message else { return None };
            let mut destination = match route.header.address_family {
                AddressFamily::Inet if family == AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
                AddressFamily::Inet6 if family == AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
                // A kernel without IPv6 answers with the routes of all families.
                _ => return None,
            };
            let mut table = TableId::from(route.header.table);
            let mut egresses = Vec::new();
            for attribute in &route.attributes {
                match attribute {
                    RouteAttribute::Destination(address) => destination = ip(address)?,
                    RouteAttribute::Table(number) => table = *number,
                    RouteAttribute::Oif(index) => egresses.push(*index),
                    RouteAttribute::MultiPath(hops) => {
                        egresses.extend(hops.iter().map(|hop| hop.interface_index));
                    }
                    _ => {}
                }
            }
            let prefix = IpNet::new(destination, route.header.destination_prefix_length).ok()?.trunc();
            Some(ListedRoute { prefix, kind: route.header.kind, table, egresses })
        };
        self.list("reading the routes", RouteNetlinkMessage::GetRoute(question), route)
    }

    /// Asks for the route to `destination`.
    pub(super) fn ask(&mut self, destination: IpAddr) -> Result<RoutesReply, RoutesError> {
        let mut question = RouteMessage::default();
        (question.header.address_family, question.header.destination_prefix_length) = match destination {
            IpAddr::V4(_) => (AddressFamily::Inet, 32),
            IpAddr::V6(_) => (AddressFamily::Inet6, 128),
        };
        question.attributes.push(RouteAttribute::Destination(destination.into()));
        let attempt = "asking for a route";
        let (answer, _) = match self.questions.ask(RouteNetlinkMessage::GetRoute(question), NLM_F_REQUEST) {
            Ok(answer) => answer,
            // No route, or an unreachable, prohibit or blackhole one.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EACCES | libc::EINVAL)
                ) =>
            {
                return Ok(RoutesReply::Refused);
            }
            Err(source) => return Err(self.error(attempt, source)),
        };
        let [RouteNetlinkMessage::NewRoute(route)] = answer.as_slice() else {
            return Err(self.error(attempt, io::Error::other("the answer is not a route")));
        };
        let (mut egress, mut source) = (None, None);
        for attribute in &route.attributes {
            match attribute {
                RouteAttribute::Oif(index) => egress = Some(*index),
                RouteAttribute::PrefSource(address) => source = ip(address),
                _ => {}
            }
        }
        Ok(RoutesReply::Route { kind: route.header.kind, egress, source })
    }

    /// Returns what `keep` makes of the entries of a list, from a reading during which the list did not change.
    fn list<M: NetlinkDeserializable, T>(
        &mut self,
        attempt: &'static str,
        question: RouteNetlinkMessage,
        keep: impl Fn(M) -> Option<T>,
    ) -> Result<Vec<T>, RoutesError> {
        for _ in 0..ATTEMPTS {
            let (mut kept, mut found) = (Vec::new(), 0);
            let each = |message| {
                if let Some(entry) = keep(message) {
                    found += 1;
                    if found <= MAX_ENTRIES {
                        kept.push(entry);
                    }
                }
            };
            let asked = self.questions.ask_each(question.clone(), NLM_F_REQUEST | NLM_F_DUMP, each);
            if found > MAX_ENTRIES {
                return Err(RoutesError::TooMany {
                    attempt,
                    netns: self.netns.clone(),
                    found,
                    limit: MAX_ENTRIES,
                });
            }
            match asked {
                Ok(false) => return Ok(kept),
                Ok(true) => {}
                Err(source) => return Err(self.error(attempt, source)),
            }
        }
        Err(RoutesError::Restless { attempt, netns: self.netns.clone() })
    }

    fn error(&self, attempt: &'static str, source: io::Error) -> RoutesError {
        if source.kind() == io::ErrorKind::TimedOut {
            return RoutesError::Slow { attempt, netns: self.netns.clone() };
        }
        RoutesError::Netlink { attempt, netns: self.netns.clone(), source }
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    }
}
