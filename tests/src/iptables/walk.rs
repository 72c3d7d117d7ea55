//! A naive interpreter of the chains: what becomes of the first packet of a connection, or of a datagram.

use std::collections::HashMap;
use std::net::SocketAddr;

use super::chains::rules;
use super::options::IptablesOptions;
use super::rule::{Chain, IpFamily, IptablesTable, Match, Protocol, Rule, RuleTarget};
use crate::testbed::Ids;

/// A packet that begins something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// Connection or datagram.
    pub protocol: Protocol,
    /// Source.
    pub from: SocketAddr,
    /// Destination.
    pub to: SocketAddr,
    /// Where it comes from.
    pub origin: PacketOrigin,
}

/// Where a packet comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PacketOrigin {
    /// A socket of this pod.
    Here {
        /// The interface by which the route to the destination leaves.
        out: String,
        /// The owner of the socket.
        owner: Ids,
        /// Its SO_MARK.
        mark: u32,
    },
    /// Outside.
    Outside {
        /// The interface on which it arrives.
        on: String,
    },
}

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IptablesVerdict {
    /// It goes where it was going.
    Pass,
    /// Its destination becomes this port of this host.
    Redirect(u16),
    /// It is given to the listener on this port with its destination unchanged.
    Tproxy(u16),
    /// It is lost.
    Drop,
}

/// The chains of one configuration.
#[derive(Debug)]
pub struct Walker {
    v4: Chains,
    v6: Chains,
}

type Chains = HashMap<(IptablesTable, Chain), Vec<Rule>>;

/// What a chain said.
enum ChainEnd {
    /// Nothing final: on with the calling chain.
    Fell,
    /// No more rules of this table.
    Accepted,
    Final(IptablesVerdict),
}

/// What rules of one hook see and change.
struct WalkState<'a> {
    packet: &'a Packet,
    input: &'a str,
    output: &'a str,
    owner: Option<Ids>,
    /// The packet's mark; it survives the way over lo.
    mark: u32,
    /// The connection's mark.
    connmark: u32,
}

impl Walker {
    /// The chains of `options`, inserted rules in their places.
    pub fn new(options: &IptablesOptions) -> Self {
        Self { v4: chains(rules(options, IpFamily::V4)), v6: chains(rules(options, IpFamily::V6)) }
    }

    /// What becomes of `packet`.
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

/// What left by lo, or was redirected there, arrives on lo. nat is not asked again: its answer belongs to the
/// connection.
fn again_over_lo(chains: &Chains, sent: &WalkState<'_>, verdict: IptablesVerdict) -> IptablesVerdict {
    let mut packet = sent.packet.clone();
    if let IptablesVerdict::Redirect(port) = verdict {
        let localhost = match packet.to {
            SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        };
        packet.to = SocketAddr::new(localhost, port);
    }
    // The socket goes with the packet, but owner has no meaning outside OUTPUT.
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
            // Zones keep two conversations of the same addresses apart; one alone does not notice.
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
        // The first packet of a connection is neither.
        Match::Established | Match::Invalid => false,
    }
}

/// Whether `-i` or `-o` with this argument means an interface; `eth+` is all that begin with eth.
fn is_called(name: &str, argument: &str) -> bool {
    // No interface at all is no interface of any name.
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
