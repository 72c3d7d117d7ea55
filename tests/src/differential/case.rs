//! A configuration, and the flows to make under it.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::actor::Sending;
use crate::iptables::IptablesOptions;
use crate::testbed::Ids;

/// A configuration and its flows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Case {
    /// The seed, or the name of a case written by hand.
    pub origin: String,
    /// The configuration.
    pub options: IptablesOptions,
    /// Whether each listener of the proxy is one socket for both families.
    pub dual_stack_proxy: bool,
    /// Whether the proxy listens before capture begins.
    pub listening_first: bool,
    /// The flows, made concurrently.
    pub flows: Vec<Flow>,
}

/// One flow.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Flow {
    /// The end that starts it.
    pub end: End,
    /// The user that makes it.
    pub ids: Ids,
    /// A connection or a datagram.
    pub kind: FlowKind,
    /// The destination.
    pub to: SocketAddr,
    /// The source address to bind.
    pub from: Option<IpAddr>,
    /// Whether an IPv6 socket makes the IPv4 flow.
    pub mapped: bool,
}

/// The end that starts a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum End {
    /// The pod.
    Pod,
    /// The outside world.
    World,
}

/// The kind of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum FlowKind {
    /// A connection.
    Tcp,
    /// A datagram.
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
