//! The witness for iptables: the walk of its rules. It must not know of `decide`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::{Fate, Flow, Place};
use crate::iptables::{Options, Origin, Packet, Protocol, Verdict, Walker};

/// The chains of a configuration.
#[derive(Debug)]
pub struct Rules(Walker);

impl Rules {
    /// Of these options.
    pub fn new(options: &Options) -> Self {
        Self(Walker::new(options))
    }

    /// What becomes of a flow.
    pub fn fate(&self, place: &Place, flow: &Flow) -> Fate {
        let packet = match flow {
            Flow::Made { udp, from, to, owner, mark } => {
                let Some((out, source)) = place.egress(to.ip()) else { return Fate::Unroutable };
                let from = from.or(source).unwrap_or(unspecified(to.ip()));
                // The kernel finds no route from 127/8 to outside (EINVAL), and asks no rule.
                if out != "lo" && from.is_ipv4() && from.is_loopback() {
                    return Fate::Unroutable;
                }
                // TCP to more than one host is refused before any rule (ENETUNREACH).
                let host = to.ip().to_canonical();
                let is_group = host.is_multicast() || host == IpAddr::V4(Ipv4Addr::BROADCAST);
                if !*udp && is_group {
                    return Fate::Unroutable;
                }
                let protocol = if *udp { Protocol::Udp } else { Protocol::Tcp };
                let origin = Origin::Here { out: out.to_owned(), owner: *owner, mark: *mark };
                Packet { protocol, from: SocketAddr::new(from, 40000), to: *to, origin }
            }
            Flow::Arriving { link, from, to } => {
                let origin = Origin::Outside { on: place.links[*link].clone() };
                Packet { protocol: Protocol::Tcp, from: SocketAddr::new(*from, 40000), to: *to, origin }
            }
        };
        match self.0.walk(&packet) {
            Verdict::Leave => Fate::Left,
            Verdict::Redirect(port) | Verdict::Tproxy(port) => Fate::To(port),
            Verdict::Drop => Fate::Dropped,
        }
    }
}

fn unspecified(of: IpAddr) -> IpAddr {
    if of.is_ipv6() { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() }
}
