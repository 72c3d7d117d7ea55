//! A configuration and flows to be made under it.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::actor::Sending;
use crate::iptables::Options;
use crate::testbed::Ids;

/// What is compared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Case {
    /// What it was drawn from, to draw it again; a name for those written down.
    pub origin: String,
    /// The configuration.
    pub options: Options,
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
    pub kind: Kind,
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
pub enum Kind {
    /// A connection.
    Tcp,
    /// A datagram, sent one way or another.
    Udp(Datagram),
}

/// How a datagram is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Datagram {
    /// sendto.
    To,
    /// connect and send.
    Connected,
    /// sendmmsg.
    Many,
}

impl From<Datagram> for Sending {
    fn from(datagram: Datagram) -> Self {
        match datagram {
            Datagram::To => Self::To,
            Datagram::Connected => Self::Connected,
            Datagram::Many => Self::Many,
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
            Kind::Tcp => "tcp",
            Kind::Udp(Datagram::To) => "udp sendto",
            Kind::Udp(Datagram::Connected) => "udp connected",
            Kind::Udp(Datagram::Many) => "udp sendmmsg",
        };
        write!(f, "{kind} from the {end} by {}:{}", self.ids.uid, self.ids.gid)?;
        if let Some(from) = self.from {
            write!(f, " bound to {from}")?;
        }
        write!(f, " to {}", self.to)?;
        if self.mapped { write!(f, " by an IPv6 socket") } else { Ok(()) }
    }
}
