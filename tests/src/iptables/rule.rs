//! What a rule is made of: only the tables, chains, matches and targets that istio-iptables uses.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// iptables or ip6tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IpFamily {
    /// iptables.
    V4,
    /// ip6tables.
    V6,
}

/// A table; the order is that in which a packet passes them within a hook.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum IptablesTable {
    /// Before connection tracking.
    Raw,
    /// Marks and TPROXY.
    Mangle,
    /// Seen by the first packet of a connection only.
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

/// The transport protocols that rules tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// `-p tcp`.
    Tcp,
    /// `-p udp`.
    Udp,
}

/// One condition of a rule; all must hold.
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

/// What a rule does with packets that match.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RuleTarget {
    /// Back to the calling chain; at the end of a built-in one, accept.
    Return,
    /// Done with this table.
    Accept,
    /// Gone.
    Drop,
    /// Into another chain of the table.
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
        /// The mark the packet gets.
        mark: u32,
        /// The listener's port.
        port: u16,
    },
    /// `CT --zone`.
    Zone(u16),
}

/// A rule and where it goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Its table.
    pub table: IptablesTable,
    /// Its chain.
    pub chain: Chain,
    /// Inserted at this position, counted from 1; appended if none.
    pub position: Option<usize>,
    /// Its conditions.
    pub matches: Vec<Match>,
    /// What it does.
    pub target: RuleTarget,
}

impl IpFamily {
    /// Whether an address or network is of this family.
    pub fn is_of(self, net: &IpNet) -> bool {
        net.addr().is_ipv6() == (self == Self::V6)
    }

    /// The network of one address each.
    pub(super) fn host(self, v4: Ipv4Addr, v6: Ipv6Addr) -> IpNet {
        match self {
            Self::V4 => Ipv4Net::from(v4).into(),
            Self::V6 => Ipv6Net::from(v6).into(),
        }
    }
}

impl Chain {
    /// Its name in iptables.
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

    /// Whether the kernel has it without being told.
    pub fn is_built_in(self) -> bool {
        matches!(self, Self::Prerouting | Self::Output)
    }
}

impl IptablesTable {
    /// Its name in iptables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Mangle => "mangle",
            Self::Nat => "nat",
        }
    }
}
