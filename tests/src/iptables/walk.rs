//! A naive interpreter of the chains: the verdict on the first packet of a connection, or on a datagram.

use std::collections::HashMap;
use std::net::SocketAddr;

use super::chains::rules;
use super::options::IptablesOptions;
use super::rule::{Chain, IpFamily, IptablesTable, Match, Protocol, Rule, RuleTarget};
use crate::testbed::Ids;

/// The first packet of a connection, or a datagram.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// The protocol.
    pub protocol: Protocol,
    /// The source.
    pub from: SocketAddr,
    /// The destination.
    pub to: SocketAddr,
    /// The origin.
    pub origin: PacketOrigin,
}

/// The origin of a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PacketOrigin {
    /// A socket of this pod.
    Here {
        /// The egress interface.
        out: String,
        /// The owner of the socket.
        owner: Ids,
        /// SO_MARK of the socket.
        mark: u32,
    },
    /// Outside.
    Outside {
        /// The ingress interface.
        on: String,
    },
}

/// The verdict on a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IptablesVerdict {
    /// Its destination stays.
    Pass,
    /// Its destination becomes this port of the host.
    Redirect(u16),
    /// It goes to the listener on this port with its destination unchanged.
    Tproxy(u16),
    /// It is dropped.
    Drop,
}

/// The chains of one configuration.
#[derive(Debug)]
pub struct Walker {
    v4: Chains,
    v6: Chains,
}

type Chains = HashMap<(IptablesTable, Chain), Vec<Rule>>;

/// The result of a chain.
enum ChainEnd {
    /// No verdict: the calling chain continues.
    Fell,
    /// The rules of this table end.
    Accepted,
    Final(IptablesVerdict),
}

/// The state that the rules of a hook read and change.
struct WalkState<'a> {
    packet: &'a Packet,
    input: &'a str,
    output: &'a str,
    owner: Option<Ids>,
    /// The mark of the packet, which stays on the way over lo.
    mark: u32,
    /// The mark of the connection.
    connmark: u32,
}

impl Walker {
    /// The chains of `options`, with inserted rules at their positions.
    pub fn new(options: &IptablesOptions) -> Self {
        Self { v4: chains(rules(options, IpFamily::V4)), v6: chains(rules(options, IpFamily::V6)) }
    }

    /// The verdict on `packet`.
    pub fn walk(&self, packet: &Packet) -> IptablesVerdict {
        let chains = if packet.to.is_ipv6() { &self.v6 } else { &self.v4 };
        match &packet.origin {
            PacketOrigin::Outside { on } => {
                let mut state =
                    WalkState { packet, input: on, output: "", owner: None, mark: 0, connmark: 0 };
                hook(
                    chains,
                    Chain::Prerouting,
                    &mut state,
                    &[IptablesTable::Raw, IptablesTable::Mangle, IptablesTable::Nat],
                )
            }
            PacketOrigin::Here { out, owner, mark } => {
                let (owner, mark) = (Some(*owner), *mark);
                let mut state = WalkState { packet, input: "", output: out, owner, mark, connmark: 0 };
                let verdict = hook(
                    chains,
                    Chain::Output,
                    &mut state,
                    &[IptablesTable::Raw, IptablesTable::Mangle, IptablesTable::Nat],
                );
                if out != "lo" && !matches!(verdict, IptablesVerdict::Redirect(_)) {
                    return verdict;
                }
                again_over_lo(chains, &state, verdict)
            }
        }
    }
}

/// A packet that leaves by lo, or is redirected, arrives on lo. Table nat is not evaluated again, because its verdict
/// belongs to the connection.
fn again_over_lo(chains: &Chains, sent: &WalkState<'_>, verdict: IptablesVerdict) -> IptablesVerdict {
    let mut packet = sent.packet.clone();
    if let IptablesVerdict::Redirect(port) = verdict {
        let localhost = match packet.to {
            SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        };
        packet.to = SocketAddr::new(localhost, port);
    }
    // The packet keeps its socket, but the match `owner` has no meaning outside OUTPUT.
    let mut state = WalkState {
        packet: &packet,
        input: "lo",
        output: "",
        owner: None,
        mark: sent.mark,
        connmark: sent.connmark,
    };
    match hook(chains, Chain::Prerouting, &mut state, &[IptablesTable::Raw, IptablesTable::Mangle]) {
        IptablesVerdict::Pass => verdict,
        changed => changed,
    }
}

fn hook(
    chains: &Chains,
    start: Chain,
    state: &mut WalkState<'_>,
    tables: &[IptablesTable],
) -> IptablesVerdict {
    for &table in tables {
        if let ChainEnd::Final(verdict) = chain(chains, table, start, state) {
            return verdict;
        }
    }
    IptablesVerdict::Pass
}

fn chain(chains: &Chains, table: IptablesTable, name: Chain, state: &mut WalkState<'_>) -> ChainEnd {
    for rule in chains.get(&(table, name)).into_iter().flatten() {
        if !rule.matches.iter().all(|condition| holds(condition, state)) {
            continue;
        }
        match rule.target {
            RuleTarget::Return => return ChainEnd::Fell,
            RuleTarget::Accept => return ChainEnd::Accepted,
            RuleTarget::Drop => return ChainEnd::Final(IptablesVerdict::Drop),
            RuleTarget::Redirect(port) => return ChainEnd::Final(IptablesVerdict::Redirect(port)),
            RuleTarget::Tproxy { port, .. } => return ChainEnd::Final(IptablesVerdict::Tproxy(port)),
            RuleTarget::SetMark(mark) => state.mark = mark,
            RuleTarget::SaveMark => state.connmark = state.mark,
            RuleTarget::RestoreMark => state.mark = state.connmark,
            // Zones only matter where two connections have the same addresses.
            RuleTarget::Zone(_) => {}
            RuleTarget::Jump(to) => match chain(chains, table, to, state) {
                ChainEnd::Fell => {}
                end => return end,
            },
        }
    }
    ChainEnd::Fell
}

fn holds(condition: &Match, state: &WalkState<'_>) -> bool {
    let packet = state.packet;
    let user = |uid| state.owner.is_some_and(|owner| owner.uid == uid);
    let group = |gid| state.owner.is_some_and(|owner| owner.gid == gid);
    match condition {
        Match::In(interface) => is_called(state.input, interface),
        Match::Out(interface) => is_called(state.output, interface),
        Match::Source(net) => net.contains(&packet.from.ip()),
        Match::Destination(net) => net.contains(&packet.to.ip()),
        Match::NotDestination(net) => !net.contains(&packet.to.ip()),
        Match::Protocol(protocol) => packet.protocol == *protocol,
        Match::Port(port) => packet.to.port() == *port,
        Match::NotPort(port) => packet.to.port() != *port,
        Match::NotPorts(ports) => !ports.contains(&packet.to.port()),
        Match::SourcePort(port) => packet.from.port() == *port,
        Match::User(uid) => user(*uid),
        Match::NotUser(uid) => !user(*uid),
        Match::Group(gid) => group(*gid),
        Match::NotGroup(gid) => !group(*gid),
        Match::Mark(mark) => state.mark == *mark,
        Match::NotMark(mark) => state.mark != *mark,
        Match::Connmark(mark) => state.connmark == *mark,
        // A first packet is neither established nor invalid.
        Match::Established | Match::Invalid => false,
    }
}

/// Whether `-i` or `-o` with this argument matches an interface. `eth+` matches all names that begin with eth.
fn is_called(name: &str, argument: &str) -> bool {
    // A packet without an interface matches no name.
    match argument.strip_suffix('+') {
        Some(start) => !name.is_empty() && name.starts_with(start),
        None => name == argument,
    }
}

fn chains(rules: Vec<Rule>) -> Chains {
    let mut chains = Chains::new();
    for rule in rules {
        let chain = chains.entry((rule.table, rule.chain)).or_default();
        match rule.position {
            None => chain.push(rule),
            Some(position) => chain.insert(position - 1, rule),
        }
    }
    chains
}

#[cfg(test)]
mod tests;
