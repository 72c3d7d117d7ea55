//! Local routes by which redirected connections and queries reach the proxy.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};

use ipnet::IpNet;
use netlink_packet_route::{
    RouteNetlinkMessage,
    route::{RouteAddress, RouteAttribute, RouteMessage},
};

use crate::netlink::Questions;

use super::{
    NetnsSetupError,
    change::{LOOPBACK, add, local_route},
};

/// IPv6 takes no route by an interface that is down. Without these, 127.0.0.1 and ::1 themselves are dialled; once the
/// interface is up, whoever follows the namespace adds them.
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

/// IPv4 has its prefixes as a part of 127/8, unless the loopback interface has less of that.
pub(super) fn add_local_prefix(questions: &mut Questions, net: IpNet) -> Result<bool, NetnsSetupError> {
    let addr = match net.network() {
        IpAddr::V4(addr) => addr,
        IpAddr::V6(_) => {
            let route = local_prefix_route(net, LOOPBACK);
            return add_if_up(questions, route, "adding a local IPv6 prefix to dial the proxy by");
        }
    };
    // A local address can be bound.
    let last = Ipv4Addr::from_bits(addr.to_bits() | (u32::MAX >> net.prefix_len()));
    if [addr, Ipv4Addr::from_bits(last.to_bits() - 1)].iter().all(|addr| UdpSocket::bind((*addr, 0)).is_ok())
    {
        return Ok(false);
    }
    let route = local_prefix_route(net, LOOPBACK);
    add_if_up(questions, route, "adding a local IPv4 prefix to dial the proxy by")
}

pub(super) const TABLE_LOCAL: u32 = 255;

pub(super) fn local_prefix_route(net: IpNet, lo: u32) -> RouteMessage {
    let mut route = local_route(net, TABLE_LOCAL, lo);
    let source = match net {
        IpNet::V4(_) => RouteAddress::Inet(Ipv4Addr::LOCALHOST),
        // Without it the kernel may take ::6.
        IpNet::V6(_) => RouteAddress::Inet6(Ipv6Addr::LOCALHOST),
    };
    route.attributes.push(RouteAttribute::PrefSource(source));
    route
}

/// A query that is redirected to 127.0.0.1 has its interface by then, if the socket or the message chose one
/// (IP_UNICAST_IF, IP_PKTINFO), and the route of 127.0.0.1 is by another. A second local route by that interface is found
/// where it was chosen, and only there: for other lookups it comes after the kernel's own.
pub(super) fn add_localhost_by(
    questions: &mut Questions,
    v6: bool,
    interface: &str,
) -> Result<bool, NetnsSetupError> {
    let Some(index) = index_of(interface)? else { return Ok(false) };
    add_if_up(questions, localhost_route(v6, index), "adding a local route to localhost by an interface")
}

pub(super) fn localhost_route(v6: bool, index: u32) -> RouteMessage {
    let net = if v6 {
        IpNet::from(IpAddr::from(Ipv6Addr::LOCALHOST))
    } else {
        IpAddr::from(Ipv4Addr::LOCALHOST).into()
    };
    let mut route = local_route(net, TABLE_LOCAL, index);
    // After the kernel's own, whose is 0.
    route.attributes.push(RouteAttribute::Priority(1024));
    route
}

/// The index of an interface of the calling thread's namespace; none if there is no such interface.
pub(super) fn index_of(interface: &str) -> Result<Option<u32>, NetnsSetupError> {
    match nix::net::if_::if_nametoindex(interface) {
        Ok(index) => Ok(Some(index)),
        Err(nix::errno::Errno::ENODEV) => Ok(None),
        Err(error) => Err(NetnsSetupError::Open(error.into())),
    }
}
