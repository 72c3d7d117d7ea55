//! Predicts the result of a flow from the rules.

use std::net::{IpAddr, SocketAddr};

use super::case::{Case, End, Flow, FlowKind};
use super::layout;
use super::observed::Observed;
use crate::actor::OriginalDst;
use crate::actor::Transport;
use crate::iptables::chains::PASSTHROUGH_V6;
use crate::iptables::{IptablesVerdict, Packet, PacketOrigin, Protocol, Walker};
use crate::testbed::PodSpec;

/// The prediction for a flow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpectedFlow {
    /// The verdict on its first packet.
    pub verdict: IptablesVerdict,
    /// The server that answers.
    pub server: Option<&'static str>,
}

/// Predicts the results of all flows of a case.
pub fn predict(case: &Case) -> Vec<ExpectedFlow> {
    let walker = Walker::new(&case.options);
    let spec = layout::spec("compared");
    case.flows.iter().map(|flow| expect(case, &walker, &spec, flow)).collect()
}

fn expect(case: &Case, walker: &Walker, spec: &PodSpec, flow: &Flow) -> ExpectedFlow {
    let protocol = if flow.kind == FlowKind::Tcp { Protocol::Tcp } else { Protocol::Udp };
    let tcp = protocol == Protocol::Tcp;
    let transport = if tcp { Transport::Tcp } else { Transport::Udp };
    let from = flow.from.unwrap_or_else(|| layout::source(spec, flow.to.ip()));
    let egress = layout::egress(spec, flow.to.ip());
    let origin = match flow.end {
        End::Pod => PacketOrigin::Here { out: egress.into(), owner: flow.ids, mark: 0 },
        End::World => PacketOrigin::Outside { on: layout::ingress(spec, flow.to.ip()).into() },
    };
    // No rule looks at the source port of a client.
    let packet = Packet { protocol, from: SocketAddr::new(from, 40000), to: flow.to, origin };
    let verdict = walker.walk(&packet);
    let inside = |port| layout::listener(&case.options, transport, port);
    // The kernel finds no route from 127/8 to the outside (EINVAL) and evaluates no rule.
    let no_route = flow.end == End::Pod && egress != "lo" && from.is_ipv4() && from.is_loopback();
    let server = match verdict {
        _ if no_route => None,
        IptablesVerdict::Drop => None,
        IptablesVerdict::Redirect(port) | IptablesVerdict::Tproxy(port) => inside(port),
        IptablesVerdict::Pass if flow.end == End::World || egress == "lo" => inside(flow.to.port()),
        IptablesVerdict::Pass if !is_routable(from) => None,
        IptablesVerdict::Pass => {
            layout::ports(&case.options, transport).contains(&flow.to.port()).then_some("world")
        }
    };
    ExpectedFlow { verdict, server }
}

/// The world outside has no listener on loopback addresses.
fn is_routable(from: IpAddr) -> bool {
    !from.is_loopback() && from != IpAddr::V6(PASSTHROUGH_V6)
}

/// The differences between `seen` and the prediction, one line each.
pub fn unexpected(flow: &Flow, expected: &ExpectedFlow, seen: &Observed) -> Vec<String> {
    let mut lines = Vec::new();
    if seen.server() != expected.server {
        lines.push(format!("answered by {:?}, not by {:?}", seen.server(), expected.server));
        return lines;
    }
    let dialled = |addr: SocketAddr| SocketAddr::new(addr.ip().to_canonical(), addr.port()) == flow.to;
    match seen {
        Observed::Connection(connection) => {
            if let Some(original) = connection.original_dst
                && original != OriginalDst::Addr(flow.to)
            {
                lines.push(format!("the original destination is {original:?}"));
            }
            for (what, name) in [("first", connection.peername), ("afterwards", connection.peername_after)] {
                if !name.is_some_and(dialled) {
                    lines.push(format!("the client's getpeername is {what} {name:?}"));
                }
            }
            if !connection.same_peername {
                lines.push("the server's getpeername differs from accept".into());
            }
            let sockname = connection.sockname.map(|name| name.to_canonical());
            if sockname != Some(connection.peer) {
                lines.push(format!("the client is {sockname:?}, the server sees {}", connection.peer));
            }
        }
        Observed::Datagram(datagram) if !dialled(datagram.from) => {
            lines.push(format!("the answer came from {}", datagram.from));
        }
        _ => {}
    }
    lines
}
