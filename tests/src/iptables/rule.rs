//! Tables, chains, matches and targets, as far as istio-iptables uses them.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// A family, and the program for its rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IpFamily {
    /// iptables.
    V4,
    /// ip6tables.
    V6,
}

/// A table, in the order in which a packet passes them within a hook.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum IptablesTable {
    /// Before connection tracking.
    Raw,
    /// Marks and TPROXY.
    Mangle,
    /// Evaluated for the first packet of a connection only.
    Nat,
}

/// A chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[expect(missing_docs, reason = "they are the chains' names")]
pub enum Chain {
    Prerouting,
    Output,
    IstioInbound,
    IstioInRedirect,
    IstioRedirect,
    IstioOutput,
    IstioOutputDns,
    IstioDivert,
    IstioTproxy,
    IstioDrop,
}

/// A transport protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// `-p tcp`.
    Tcp,
    /// `-p udp`.
    Udp,
}

/// A condition of a rule. All conditions must hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Match {
    /// `-i`.
    In(String),
    /// `-o`.
    Out(String),
    /// `-s`.
    Source(IpNet),
    /// `-d`.
    Destination(IpNet),
    /// `! -d`.
    NotDestination(IpNet),
    /// `-p`.
    Protocol(Protocol),
    /// `--dport`.
    Port(u16),
    /// `! --dport`.
    NotPort(u16),
    /// `-m multiport ! --dports`.
    NotPorts(Vec<u16>),
    /// `--sport`.
    SourcePort(u16),
    /// `-m owner --uid-owner`.
    User(u32),
    /// `-m owner ! --uid-owner`.
    NotUser(u32),
    /// `-m owner --gid-owner`.
    Group(u32),
    /// `-m owner ! --gid-owner`.
    NotGroup(u32),
    /// `-m mark --mark`.
    Mark(u32),
    /// `-m mark ! --mark`.
    NotMark(u32),
    /// `-m connmark --mark`.
    Connmark(u32),
    /// `-m conntrack --ctstate RELATED,ESTABLISHED`.
    Established,
    /// `-m conntrack --ctstate INVALID`.
    Invalid,
}

/// What a rule does with matching packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RuleTarget {
    /// Return to the calling chain. In a built-in chain: accept.
    Return,
    /// `ACCEPT`: end of this table.
    Accept,
    /// `DROP`.
    Drop,
    /// Jump to another chain of the table.
    Jump(Chain),
    /// `REDIRECT --to-ports`.
    Redirect(u16),
    /// `MARK --set-mark`.
    SetMark(u32),
    /// `CONNMARK --save-mark`.
    SaveMark,
    /// `CONNMARK --restore-mark`.
    RestoreMark,
    /// `TPROXY --tproxy-mark MARK/0xffffffff --on-port`.
    Tproxy {
        /// The mark that the packet gets.
        mark: u32,
        /// The port of the listener.
        port: u16,
    },
    /// `CT --zone`.
    Zone(u16),
}

/// A rule and its position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// The table.
    pub table: IptablesTable,
    /// The chain.
    pub chain: Chain,
    /// The position to insert at, from 1. `None`: append.
    pub position: Option<usize>,
    /// The conditions.
    pub matches: Vec<Match>,
    /// The target.
    pub target: RuleTarget,
}

impl IpFamily {
    /// Whether the family of an address or network is this one.
    pub fn is_of(self, net: &IpNet) -> bool {
        net.addr().is_ipv6() == (self == Self::V6)
    }

    /// The length of the prefix of a single address.
    pub(super) fn host(self, v4: Ipv4Addr, v6: Ipv6Addr) -> IpNet {
        match self {
            Self::V4 => Ipv4Net::from(v4).into(),
            Self::V6 => Ipv6Net::from(v6).into(),
        }
    }
}

impl Chain {
    /// The name in iptables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prerouting => "PREROUTING",
            Self::Output => "OUTPUT",
            Self::IstioInbound => "ISTIO_INBOUND",
            Self::IstioInRedirect => "ISTIO_IN_REDIRECT",
            Self::IstioRedirect => "ISTIO_REDIRECT",
            Self::IstioOutput => "ISTIO_OUTPUT",
            Self::IstioOutputDns => "ISTIO_OUTPUT_DNS",
            Self::IstioDivert => "ISTIO_DIVERT",
            Self::IstioTproxy => "ISTIO_TPROXY",
            Self::IstioDrop => "ISTIO_DROP",
        }
    }

    /// Whether the chain is built in.
    pub fn is_built_in(self) -> bool {
        matches!(self, Self::Prerouting | Self::Output)
    }
}

impl IptablesTable {
    /// The name in iptables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Mangle => "mangle",
            Self::Nat => "nat",
        }
    }
}
