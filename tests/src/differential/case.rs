//! A configuration and flows to be made under it.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::actor::Sending;
use crate::iptables::IptablesOptions;
use crate::testbed::Ids;

/// What is compared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Case {
    /// What it was drawn from, to draw it again; a name for those written down.
    pub origin: String,
    /// The configuration.
    pub options: IptablesOptions,
    /// The proxy's listeners take both families by one socket each.
    pub dual_stack_proxy: bool,
    /// The proxy listens before capture begins.
    pub listening_first: bool,
    /// The flows, made at the same time.
    pub flows: Vec<Flow>,
}

/// One flow.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Flow {
    /// Where it begins.
    pub end: End,
    /// Who makes it.
    pub ids: Ids,
    /// Connection or datagram.
    pub kind: FlowKind,
    /// Where to.
    pub to: SocketAddr,
    /// A source address bound first.
    pub from: Option<IpAddr>,
    /// IPv4 by an IPv6 socket.
    pub mapped: bool,
}

/// Where a flow begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum End {
    /// In the pod.
    Pod,
    /// In the outside world.
    World,
}

/// The kind of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum FlowKind {
    /// A connection.
    Tcp,
    /// A datagram, sent one way or another.
    Udp(DatagramMethod),
}

/// How a datagram is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum DatagramMethod {
    /// sendto.
    To,
    /// connect and send.
    Connected,
    /// sendmmsg.
    Many,
}

impl From<DatagramMethod> for Sending {
    fn from(datagram: DatagramMethod) -> Self {
        match datagram {
            DatagramMethod::To => Self::To,
            DatagramMethod::Connected => Self::Connected,
            DatagramMethod::Many => Self::Many,
        }
    }
}

impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = match self.end {
            End::Pod => "pod",
            End::World => "world",
        };
        let kind = match self.kind {
            FlowKind::Tcp => "tcp",
            FlowKind::Udp(DatagramMethod::To) => "udp sendto",
            FlowKind::Udp(DatagramMethod::Connected) => "udp connected",
            FlowKind::Udp(DatagramMethod::Many) => "udp sendmmsg",
        };
        write!(f, "{kind} from the {end} by {}:{}", self.ids.uid, self.ids.gid)?;
        if let Some(from) = self.from {
            write!(f, " bound to {from}")?;
        }
        write!(f, " to {}", self.to)?;
        if self.mapped { write!(f, " by an IPv6 socket") } else { Ok(()) }
    }
}
