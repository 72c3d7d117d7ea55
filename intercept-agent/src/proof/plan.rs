//! Which connections a probe makes: such that the rules of the pod capture, to addresses that no host has.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use intercept_common::{
    Addr, Family, InboundFlow, OutboundFlow, PolicyLookup, ProxyListener, Verdict,
    decide::{Owner, TproxyMark},
    decide_inbound, decide_outbound,
    layout::{ListenerKey, policy},
};
use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST};
use netlink_packet_route::{
    RouteNetlinkMessage,
    address::{AddressAttribute, AddressMessage, AddressScope},
};
use netlink_sys::protocols::NETLINK_ROUTE;

use super::{Probed, ProofError};
use crate::{
    maps::FromMaps,
    netlink::Questions,
    netns::Netns,
    options::{InboundPorts, Ports},
};

/// Addresses of documentation (RFC 5737, RFC 3849), which no host has.
const DOCUMENTATION: [IpAddr; 4] = [
    IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
    IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1)),
    IpAddr::V4(Ipv4Addr::new(203, 0, 113, 1)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
];
/// Istio's own probe uses this port, on which nothing listens.
const PROBE_PORT: u16 = 15002;
/// LOOPBACK_IFINDEX of the kernel, in every namespace.
const LOOPBACK: u32 = 1;
/// The port that an inbound connection comes from.
const REMOTE_PORT: u16 = 1;
/// Users and groups of the child are the first from here down that are not the proxy's: this one is nobody.
const FIRST_ID: u32 = 65534;
/// More than there may be owners (`MAX_OWNERS`) and groups (`MAX_OWNER_GROUPS`) in a policy.
const IDS: u32 = 96;

/// A connection from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct InboundProbe {
    /// The pod's address, and a port that is captured.
    pub(super) local: SocketAddr,
    /// An address that is not the pod's.
    pub(super) remote: SocketAddr,
    /// The interface that has the pod's address.
    pub(super) ifindex: u32,
}

/// The connections of a probe, at most one of a family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ProbePlan {
    /// User and group of the child.
    pub(super) owner: Option<Owner>,
    /// Its destinations.
    pub(super) outbound: Vec<SocketAddr>,
    pub(super) inbound: Vec<InboundProbe>,
}

impl ProbePlan {
    pub(super) fn of(pod: &Probed<'_>) -> Result<Self, ProofError> {
        pod.maps.look_up(|lookup| Self::by_lookup(pod, lookup))?
    }

    fn by_lookup(pod: &Probed<'_>, lookup: &FromMaps<'_>) -> Result<Self, ProofError> {
        let mut plan = Self { owner: owner(pod, lookup)?, ..Self::default() };
        if let Some(owner) = plan.owner {
            plan.outbound = outbound(pod, owner, lookup);
        }
        let addresses = match addresses(pod.netns)? {
            Ok(addresses) => addresses,
            Err(source) => {
                return Err(ProofError::Addresses { netns: pod.netns.name().to_owned(), source });
            }
        };
        for is_family in [IpAddr::is_ipv4, IpAddr::is_ipv6] {
            let of_family = addresses.iter().filter(|(address, _)| is_family(address));
            plan.inbound.extend(of_family.filter_map(|found| inbound(pod, *found, lookup)).next());
        }
        Ok(plan)
    }
}

/// A user and a group that are not the proxy's and, if the policy names groups, are captured.
fn owner(pod: &Probed<'_>, lookup: &FromMaps<'_>) -> Result<Option<Owner>, ProofError> {
    let policy = pod.policy;
    let mut candidates = (0..IDS).map(|below| FIRST_ID - below);
    let uid = candidates.clone().find(|uid| !policy.is_proxy(*uid, Owner::NONE.gid));
    let is_other = |gid: &u32| *gid != 0 && !policy.is_proxy(Owner::NONE.uid, *gid);
    let gid = if policy.flags & policy::GROUPS_ONLY != 0 {
        pod.maps.groups_of(policy.id)?.into_iter().find(is_other)
    } else {
        let is_except = policy.flags & policy::GROUPS_EXCEPT != 0;
        candidates.find(|gid| is_other(gid) && !(is_except && lookup.group(policy.id, *gid)))
    };
    Ok(uid.zip(gid).map(|(uid, gid)| Owner { uid, gid }))
}

/// The first destination of each family that is captured.
fn outbound(pod: &Probed<'_>, owner: Owner, lookup: &impl PolicyLookup) -> Vec<SocketAddr> {
    // Envoy has a filter chain of its own for its port, which leads nowhere.
    let ports: Vec<u16> = [pod.policy.outbound_port, PROBE_PORT]
        .into_iter()
        .chain(firsts(&pod.config.outbound_ports))
        .collect();
    let included = pod.config.include.list.iter().map(ipnet::IpNet::network);
    let addresses: Vec<IpAddr> = DOCUMENTATION.into_iter().chain(included).collect();
    let is_captured = |dst: &SocketAddr| {
        let flow = OutboundFlow {
            protocol: 6,
            dst: dst.ip().into(),
            dst_port: dst.port(),
            src: Addr::UNSPECIFIED,
            owner,
            mark: 0,
            container: 0,
        };
        let decided = decide_outbound(pod.policy, &flow, lookup);
        decided.mark == TproxyMark::None
            && decided.decision.verdict == Verdict::Redirect(ProxyListener::Outbound)
    };
    let first_of = |is_family: fn(&IpAddr) -> bool| {
        let of_family = addresses.iter().copied().filter(is_family);
        of_family
            .flat_map(|address| ports.iter().map(move |port| SocketAddr::new(address, *port)))
            .find(is_captured)
    };
    [first_of(IpAddr::is_ipv4), first_of(IpAddr::is_ipv6)].into_iter().flatten().collect()
}

fn inbound(
    pod: &Probed<'_>,
    (address, ifindex): (IpAddr, u32),
    lookup: &impl PolicyLookup,
) -> Option<InboundProbe> {
    let listed = match &pod.config.inbound_ports {
        InboundPorts::All => Vec::new(),
        InboundPorts::Only(ports) => firsts(ports).collect(),
    };
    // With '*', some of these are not excluded.
    let any = (PROBE_PORT..PROBE_PORT + 4096).take(4096);
    let ports: Vec<u16> = if pod.policy.flags & policy::BY_LISTENER != 0 {
        application_ports(pod, address)
    } else if listed.is_empty() {
        any.collect()
    } else {
        listed
    };
    let remotes = DOCUMENTATION.into_iter().filter(|remote| remote.is_ipv4() == address.is_ipv4());
    for remote in remotes {
        let found = ports.iter().find(|port| {
            let flow = InboundFlow { dst: address.into(), dst_port: **port, src: remote.into(), ifindex };
            decide_inbound(pod.policy, &flow, lookup).verdict == Verdict::Redirect(ProxyListener::Inbound)
        });
        if let Some(port) = found {
            let local = SocketAddr::new(address, *port);
            return Some(InboundProbe { local, remote: SocketAddr::new(remote, REMOTE_PORT), ifindex });
        }
    }
    None
}

/// The ports on which applications of a machine's workload listen for connections to an address.
fn application_ports(pod: &Probed<'_>, address: IpAddr) -> Vec<u16> {
    let cookie = pod.netns.cookie();
    let registered = pod.maps.listeners(cookie).unwrap_or_default();
    let is_for = |found: &&ListenerKey| {
        let bound = |bound| ListenerKey::application(cookie, found.port, bound, 0);
        let v4 = ListenerKey { family: Family::V4.version(), ..bound(Addr::UNSPECIFIED) };
        let places = [bound(address.into()), bound(Addr::UNSPECIFIED), v4];
        let is_family = |key: &ListenerKey| address.is_ipv4() || key.family() == Family::V6;
        let is_at = |key: &ListenerKey| key.family == found.family && key.slot == found.slot;
        found.is_application() && places.iter().any(|key| is_family(key) && is_at(key))
    };
    registered.iter().filter(is_for).map(|found| found.port).collect()
}

fn firsts(ports: &Ports) -> impl Iterator<Item = u16> {
    ports.ranges().iter().map(|range| *range.start())
}

/// The addresses of a namespace by which others reach it, with their interfaces.
fn addresses(netns: &Netns) -> Result<std::io::Result<Vec<(IpAddr, u32)>>, ProofError> {
    let list = |mut questions: Questions| {
        let question = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        let (answers, _) = questions.ask(question, NLM_F_REQUEST | NLM_F_DUMP)?;
        Ok(answers.into_iter().filter_map(global_address).collect())
    };
    Ok(Questions::open(netns, NETLINK_ROUTE)?.and_then(list))
}

fn global_address(answer: RouteNetlinkMessage) -> Option<(IpAddr, u32)> {
    let RouteNetlinkMessage::NewAddress(found) = answer else { return None };
    // `::6`, which a capture adds, is global by its scope.
    if found.header.scope != AddressScope::Universe || found.header.index == LOOPBACK {
        return None;
    }
    let by = |wanted: fn(&AddressAttribute) -> Option<IpAddr>| found.attributes.iter().find_map(wanted);
    // On a point-to-point interface, Address is the peer's.
    let local = by(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    let address = local.or_else(|| {
        by(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        })
    })?;
    (!address.is_loopback()).then_some((address, found.header.index))
}
