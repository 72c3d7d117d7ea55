//! What both ends of a flow saw, without what differs from run to run.

use std::net::{IpAddr, SocketAddr};

use crate::actor::{Answer, DialOutcome, Dialled, FlowStage, OriginalDst, Queried, QueryReply};

/// The result of a flow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Observed {
    /// A server answered a connection.
    Connection(Connection),
    /// A server answered a datagram.
    Datagram(ObservedDatagram),
    /// Refused.
    Refused,
    /// Reset or closed before an answer.
    Dropped(FlowStage),
    /// No answer.
    TimedOut(FlowStage),
    /// Another error.
    Failed(FlowStage, i32),
    /// Something that is not an answer of the actor.
    Garbled(String),
}

/// Both ends of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Connection {
    /// The server that answered.
    pub server: String,
    /// SO_ORIGINAL_DST, only from the proxy's listeners.
    pub original_dst: Option<OriginalDst>,
    /// The client as the server sees it.
    pub peer: IpAddr,
    /// Whether both ends see the same client port. (Connection tracking changes it when it clashes.)
    pub same_port: bool,
    /// Whether getpeername and accept of the server agree.
    pub same_peername: bool,
    /// getsockname of the client.
    pub sockname: Option<IpAddr>,
    /// getpeername of the client after connect().
    pub peername: Option<SocketAddr>,
    /// getpeername of the client after the answer.
    pub peername_after: Option<SocketAddr>,
}

/// Both ends of a datagram. The client as seen by the DNS proxy is not compared: nothing depends on it, and sendto()
/// cannot bind a source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObservedDatagram {
    /// The server that answered.
    pub server: String,
    /// The source of the answer.
    pub from: SocketAddr,
    /// getsockname of the client.
    pub sockname: Option<IpAddr>,
    /// getpeername of the client, if connected.
    pub peername: Option<SocketAddr>,
}

/// The listeners that read the original destination.
const PROXY_STATE: [&str; 2] = ["outbound", "inbound"];

impl Observed {
    /// The server that answered.
    pub fn server(&self) -> Option<&str> {
        match self {
            Self::Connection(connection) => Some(&connection.server),
            Self::Datagram(datagram) => Some(&datagram.server),
            _ => None,
        }
    }
}

impl From<Dialled> for Observed {
    fn from(dialled: Dialled) -> Self {
        match dialled.outcome {
            DialOutcome::Answered(ref answer) => Self::Connection(connection(answer, &dialled)),
            DialOutcome::Garbled(text) => Self::Garbled(text),
            DialOutcome::Refused => Self::Refused,
            DialOutcome::Dropped(stage) => Self::Dropped(stage),
            DialOutcome::TimedOut(stage) => Self::TimedOut(stage),
            DialOutcome::Failed { stage, errno } => Self::Failed(stage, errno),
        }
    }
}

impl From<Queried> for Observed {
    fn from(mut queried: Queried) -> Self {
        match queried.replies.pop() {
            Some(QueryReply::Answered { from, answer }) => Self::Datagram(ObservedDatagram {
                server: answer.server,
                from,
                sockname: queried.sockname.map(|name| name.ip()),
                peername: queried.peername,
            }),
            Some(QueryReply::Failed { errno: libc::ECONNREFUSED, .. }) => Self::Refused,
            Some(QueryReply::Failed { stage, errno }) => Self::Failed(stage, errno),
            Some(QueryReply::TimedOut) | None => Self::TimedOut(FlowStage::Read),
        }
    }
}

fn connection(answer: &Answer, dialled: &Dialled) -> Connection {
    let asks = PROXY_STATE.contains(&answer.server.as_str());
    Connection {
        server: answer.server.clone(),
        original_dst: answer.original_dst.filter(|_| asks),
        peer: answer.peer.ip().to_canonical(),
        same_port: dialled.sockname.map(|name| name.port()) == Some(answer.peer.port()),
        same_peername: answer.peername == Some(answer.peer),
        sockname: dialled.sockname.map(|name| name.ip()),
        peername: dialled.peername,
        peername_after: dialled.peername_after,
    }
}
