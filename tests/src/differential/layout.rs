//! The pod of a comparison: its addresses, routes and listeners.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use crate::actor::Transport;
use crate::iptables::IptablesOptions;
use crate::iptables::chains::{DNS_PORT, PASSTHROUGH_V6};
use crate::testbed::PodSpec;

/// The ports on which applications and the outside world accept connections.
const APP_PORTS: [u16; 11] = [22, 53, 80, 443, 3306, 8080, 9090, 15000, 15002, 15020, 15090];
/// The ports on which applications and the outside world answer datagrams.
const APP_UDP_PORTS: [u16; 2] = [53, 5353];

/// A pod with two interfaces, of which the first has two addresses of each family.
pub fn spec(label: &str) -> PodSpec {
    PodSpec::new(label).with_eth1().with_address(0, "10.66.0.3/24").with_address(0, "fd66::3/64")
}

/// The name of the listener on a port in the pod. All listeners are wildcard listeners.
pub fn listener(options: &IptablesOptions, transport: Transport, port: u16) -> Option<&'static str> {
    if port == DNS_PORT {
        return Some("dns");
    }
    if transport == Transport::Udp {
        return APP_UDP_PORTS.contains(&port).then_some("app");
    }
    if port == options.envoy_port {
        Some("outbound")
    } else if port == options.inbound_port {
        Some("inbound")
    } else if port == options.tunnel_port {
        Some("tunnel")
    } else {
        APP_PORTS.contains(&port).then_some("app")
    }
}

/// The ports with a listener in the pod. The outside world listens on the same ports.
pub fn ports(options: &IptablesOptions, transport: Transport) -> BTreeSet<u16> {
    let special: &[u16] = &[options.envoy_port, options.inbound_port, options.tunnel_port, DNS_PORT];
    match transport {
        Transport::Tcp => APP_PORTS.iter().chain(special).copied().collect(),
        Transport::Udp => APP_UDP_PORTS.iter().copied().chain([DNS_PORT]).collect(),
    }
}

/// Whether an address belongs to the pod, including ::6, which istio-iptables adds.
pub fn is_own(spec: &PodSpec, addr: IpAddr) -> bool {
    addr.is_loopback()
        || addr == IpAddr::V6(PASSTHROUGH_V6)
        || spec.interfaces.iter().flat_map(|interface| &interface.pod).any(|own| own.addr() == addr)
}

/// The interface by which packets to `addr` leave the pod.
pub fn egress(spec: &PodSpec, addr: IpAddr) -> &str {
    if is_own(spec, addr) {
        return "lo";
    }
    let on_link = |interface: &&crate::testbed::PodInterface| {
        interface
            .pod
            .iter()
            .chain(interface.routes.iter().filter(|route| route.prefix_len() > 0))
            .any(|net: &IpNet| net.contains(&addr))
    };
    let interface = spec.interfaces.iter().find(on_link).unwrap_or(&spec.interfaces[0]);
    &interface.name
}

/// The interface on which packets from outside to `addr` arrive.
pub fn ingress(spec: &PodSpec, addr: IpAddr) -> &str {
    let has = |interface: &&crate::testbed::PodInterface| interface.pod.iter().any(|own| own.addr() == addr);
    spec.interfaces.iter().find(has).map_or("eth0", |interface| &interface.name)
}

/// The source the kernel chooses for packets to `addr`.
pub fn source(spec: &PodSpec, addr: IpAddr) -> IpAddr {
    match addr {
        IpAddr::V4(addr) if addr.is_loopback() => Ipv4Addr::LOCALHOST.into(),
        // RFC 6724 rule 1: an address of the host is its own source. IPv4 uses the primary address of the interface.
        IpAddr::V6(_) if is_own(spec, addr) => addr,
        _ => {
            let name = if is_own(spec, addr) { ingress(spec, addr) } else { egress(spec, addr) };
            let interface = spec.interfaces.iter().find(|interface| interface.name == name);
            let mut addresses = interface.into_iter().flat_map(|interface| &interface.pod).map(IpNet::addr);
            let unspecified =
                if addr.is_ipv6() { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
            addresses.find(|own| own.is_ipv6() == addr.is_ipv6()).unwrap_or(unspecified)
        }
    }
}
