//! The model of iptables: interprets its rules. It must not use `decide`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::{ModelFlow, ModelNetns, ModelVerdict};
use crate::iptables::{IptablesOptions, IptablesVerdict, Packet, PacketOrigin, Protocol, Walker};

/// The rules of a configuration.
#[derive(Debug)]
pub struct IptablesModel(Walker);

impl IptablesModel {
    /// The rules for these options.
    pub fn new(options: &IptablesOptions) -> Self {
        Self(Walker::new(options))
    }

    /// The verdict on a flow.
    pub fn verdict(&self, netns: &ModelNetns, flow: &ModelFlow) -> ModelVerdict {
        let packet = match flow {
            ModelFlow::Made { udp, from, to, owner, mark } => {
                let Some((out, source)) = netns.egress(to.ip()) else { return ModelVerdict::Unroutable };
                let from = from.or(source).unwrap_or(unspecified(to.ip()));
                // The kernel finds no route from 127/8 to the outside (EINVAL) and evaluates no rule.
                if out != "lo" && from.is_ipv4() && from.is_loopback() {
                    return ModelVerdict::Unroutable;
                }
                // The kernel refuses TCP to a multicast or broadcast address before any rule (ENETUNREACH).
                let host = to.ip().to_canonical();
                let is_group = host.is_multicast() || host == IpAddr::V4(Ipv4Addr::BROADCAST);
                if !*udp && is_group {
                    return ModelVerdict::Unroutable;
                }
                let protocol = if *udp { Protocol::Udp } else { Protocol::Tcp };
                let origin = PacketOrigin::Here { out: out.to_owned(), owner: *owner, mark: *mark };
                Packet { protocol, from: SocketAddr::new(from, 40000), to: *to, origin }
            }
            ModelFlow::Arriving { link, from, to } => {
                let origin = PacketOrigin::Outside { on: netns.links[*link].clone() };
                Packet { protocol: Protocol::Tcp, from: SocketAddr::new(*from, 40000), to: *to, origin }
            }
        };
        match self.0.walk(&packet) {
            IptablesVerdict::Pass => ModelVerdict::Passed,
            IptablesVerdict::Redirect(port) | IptablesVerdict::Tproxy(port) => ModelVerdict::To(port),
            IptablesVerdict::Drop => ModelVerdict::Dropped,
        }
    }
}

fn unspecified(of: IpAddr) -> IpAddr {
    if of.is_ipv6() { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() }
}
