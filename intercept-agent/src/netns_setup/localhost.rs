//! Local routes by which redirected connections and queries reach the proxy.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};

use ipnet::IpNet;
use netlink_packet_route::{
    RouteNetlinkMessage,
    route::{RouteAddress, RouteAttribute, RouteMessage},
};

use intercept_common::Family;

use crate::netlink::Questions;

use super::{
    NetnsSetupError,
    change::{LOOPBACK, add, local_route},
};

/// Adds a route. False if it exists, or if the interface is down, through which IPv6 accepts no routes. Without the
/// route, 127.0.0.1 and ::1 themselves are the destination. When the interface goes up, the follower of the namespace
/// adds the route.
fn add_if_up(
    questions: &mut Questions,
    route: RouteMessage,
    action: &'static str,
) -> Result<bool, NetnsSetupError> {
    match add(questions, RouteNetlinkMessage::NewRoute(route), action) {
        Err(NetnsSetupError::Netlink { source, .. }) if source.raw_os_error() == Some(libc::ENETDOWN) => {
            Ok(false)
        }
        added => added,
    }
}

/// Makes a prefix local. False if it is local already, as the IPv4 prefixes are in 127.0.0.0/8 unless the loopback
/// interface has a shorter range.
pub(super) fn add_local_prefix(questions: &mut Questions, net: IpNet) -> Result<bool, NetnsSetupError> {
    let addr = match net.network() {
        IpAddr::V4(addr) => addr,
        IpAddr::V6(_) => {
            let route = local_prefix_route(net, LOOPBACK);
            return add_if_up(questions, route, "adding a local IPv6 prefix for connections to the proxy");
        }
    };
    // Only a local address can be bound.
    let last = Ipv4Addr::from_bits(addr.to_bits() | (u32::MAX >> net.prefix_len()));
    if [addr, Ipv4Addr::from_bits(last.to_bits() - 1)].iter().all(|addr| UdpSocket::bind((*addr, 0)).is_ok())
    {
        return Ok(false);
    }
    let route = local_prefix_route(net, LOOPBACK);
    add_if_up(questions, route, "adding a local IPv4 prefix for connections to the proxy")
}

pub(super) const TABLE_LOCAL: u32 = 255;

pub(super) fn local_prefix_route(net: IpNet, lo: u32) -> RouteMessage {
    let mut route = local_route(net, TABLE_LOCAL, lo);
    let source = match net {
        IpNet::V4(_) => RouteAddress::Inet(Ipv4Addr::LOCALHOST),
        // Otherwise the kernel may select ::6.
        IpNet::V6(_) => RouteAddress::Inet6(Ipv6Addr::LOCALHOST),
    };
    route.attributes.push(RouteAttribute::PrefSource(source));
    route
}

/// Makes localhost reachable for sockets that have selected an interface. A query that is redirected to 127.0.0.1 is
/// already restricted to the interface that the socket or the message has selected (IP_UNICAST_IF, IP_PKTINFO), and the
/// route of 127.0.0.1 uses another. A second local route through that interface is found only by such lookups: for
/// others it comes after the kernel's own.
pub(super) fn add_localhost_by(
    questions: &mut Questions,
    family: Family,
    interface: &str,
) -> Result<bool, NetnsSetupError> {
    let Some(index) = index_of(interface)? else { return Ok(false) };
    add_if_up(
        questions,
        localhost_route(family, index),
        "adding a local route to localhost through an interface",
    )
}

pub(super) fn localhost_route(family: Family, index: u32) -> RouteMessage {
    let net = match family {
        Family::V4 => IpNet::from(IpAddr::from(Ipv4Addr::LOCALHOST)),
        Family::V6 => IpNet::from(IpAddr::from(Ipv6Addr::LOCALHOST)),
    };
    let mut route = local_route(net, TABLE_LOCAL, index);
    // After the kernel's own route, whose priority is 0.
    route.attributes.push(RouteAttribute::Priority(1024));
    route
}

/// Returns the index of an interface in the calling thread's namespace. `None` if it does not exist.
pub(super) fn index_of(interface: &str) -> Result<Option<u32>, NetnsSetupError> {
    match nix::net::if_::if_nametoindex(interface) {
        Ok(index) => Ok(Some(index)),
        Err(nix::errno::Errno::ENODEV) => Ok(None),
        Err(error) => Err(NetnsSetupError::Open(error.into())),
    }
}
