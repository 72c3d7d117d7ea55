//! What the actor is told and what it tells; one JSON document a line.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::testbed::Ids;

/// A line to the actor.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Request {
    /// Comes back in the reply.
    pub id: u64,
    /// What to do.
    pub job: ActorJob,
}

/// What the actor can do.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum ActorJob {
    /// Answer connections or datagrams until told to close.
    Listen(Listen),
    /// Pass connections on until told to close.
    Relay(Relay),
    /// Close the listener or relay that the request of this id opened.
    Close(u64),
    /// Make one connection.
    Dial(Dial),
    /// Send datagrams and await the answers.
    Query(Query),
}

/// A line from the actor.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum ActorMessage {
    /// The answer to a request.
    Reply {
        /// The request's.
        id: u64,
        /// What came of it.
        done: Done,
    },
    /// What a relay did with one connection, told when it had connected onwards or failed to.
    Relayed(Relayed),
}

/// What came of a request.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Done {
    /// A listener or relay is ready at this address.
    Ready(SocketAddr),
    /// A listener or relay takes no more connections.
    Closed,
    /// Of [`ActorJob::Dial`].
    Dialled(Dialled),
    /// Of [`ActorJob::Query`].
    Queried(Queried),
    /// It could not be tried at all.
    Failed(String),
}

/// How a listening socket is made.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Bind {
    /// Whose socket it is.
    pub ids: Ids,
    /// Where it is bound.
    pub addr: SocketAddr,
    /// An IPv6 socket does not take IPv4 as well.
    pub v6only: bool,
    /// SO_REUSEPORT.
    pub reuseport: bool,
    /// IP_TRANSPARENT, as TPROXY needs it.
    pub transparent: bool,
}

impl Bind {
    /// An ordinary socket, for IPv4 or IPv6 alone.
    pub fn new(ids: Ids, addr: SocketAddr) -> Self {
        Self { ids, addr, v6only: true, reuseport: false, transparent: false }
    }
}

/// The kind of socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Transport {
    /// Connections: each gets one [`Answer`] as a line of JSON.
    Tcp,
    /// Datagrams: each gets one [`Answer`], from the address it was sent to.
    Udp,
}

/// A server that says who it is and what it sees.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Listen {
    /// How it introduces itself.
    pub name: String,
    /// Connections or datagrams.
    pub transport: Transport,
    /// Its socket.
    pub bind: Bind,
}

/// What a server saw of a connection or datagram.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The server's name.
    pub server: String,
    /// SO_ORIGINAL_DST of the connection; none for datagrams.
    pub original_dst: Option<OriginalDst>,
    /// Its own address: getsockname, or where the datagram was sent.
    pub local: SocketAddr,
    /// The client's, from accept or recvmsg.
    pub peer: SocketAddr,
    /// The client's, from getpeername; none for datagrams.
    pub peername: Option<SocketAddr>,
    /// What the client wrote in front of the datagram; 0 for connections.
    pub nonce: u64,
}

/// What SO_ORIGINAL_DST (IP6T_SO_ORIGINAL_DST for IPv6) answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum OriginalDst {
    /// An address.
    Addr(SocketAddr),
    /// An error, for instance 2 (ENOENT) or 92 (ENOPROTOOPT).
    Errno(i32),
}

/// One connection to be made.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Dial {
    /// Who makes it.
    pub ids: Ids,
    /// Where to.
    pub to: SocketAddr,
    /// A source address to bind first.
    pub from: Option<IpAddr>,
    /// Make an IPv4 connection by an IPv6 socket.
    pub mapped: bool,
    /// How long to wait for a connection, and then for the answer.
    pub timeout: Duration,
}

impl Dial {
    /// A plain connection, given three seconds.
    pub fn new(ids: Ids, to: SocketAddr) -> Self {
        Self { ids, to, from: None, mapped: false, timeout: Duration::from_secs(3) }
    }
}

/// What a client saw. The addresses are as the system calls gave them; IPv4 on an IPv6 socket is ::ffff:a.b.c.d.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dialled {
    /// How it ended.
    pub outcome: DialOutcome,
    /// Its own address once connected.
    pub sockname: Option<SocketAddr>,
    /// getpeername once connected.
    pub peername: Option<SocketAddr>,
    /// getpeername when the answer had come.
    pub peername_after: Option<SocketAddr>,
}

/// How a connection ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DialOutcome {
    /// A server answered.
    Answered(Answer),
    /// Something answered, but not with an [`Answer`].
    Garbled(String),
    /// ECONNREFUSED.
    Refused,
    /// ECONNRESET, or the end of the stream before an answer.
    Dropped(FlowStage),
    /// Nothing came in time.
    TimedOut(FlowStage),
    /// Another error.
    Failed {
        /// What was being done.
        stage: FlowStage,
        /// The error's number.
        errno: i32,
    },
}

/// What a client was doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FlowStage {
    /// socket() and its options.
    Socket,
    /// bind().
    Bind,
    /// connect().
    Connect,
    /// sendto() and the like.
    Send,
    /// Waiting for the answer.
    Read,
}

/// How datagrams are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Sending {
    /// sendto on an unconnected socket.
    To,
    /// connect, then send; for a single destination.
    Connected,
    /// One sendmmsg for all destinations.
    Many,
}

/// Datagrams to be sent from one socket, one for each destination.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Query {
    /// Who sends.
    pub ids: Ids,
    /// Where to.
    pub to: Vec<SocketAddr>,
    /// A source address to bind first.
    pub from: Option<IpAddr>,
    /// Send IPv4 by an IPv6 socket.
    pub mapped: bool,
    /// By which calls.
    pub sending: Sending,
    /// How long to wait for the answers.
    pub timeout: Duration,
}

impl Query {
    /// One datagram by sendto, given a second.
    pub fn new(ids: Ids, to: SocketAddr) -> Self {
        let timeout = Duration::from_secs(1);
        Self { ids, to: vec![to], from: None, mapped: false, sending: Sending::To, timeout }
    }
}

/// What a sender of datagrams saw.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Queried {
    /// For each destination, what came back.
    pub replies: Vec<QueryReply>,
    /// Its own address after sending.
    pub sockname: Option<SocketAddr>,
    /// getpeername, on a connected socket.
    pub peername: Option<SocketAddr>,
}

/// What came back for one datagram.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum QueryReply {
    /// An answer.
    Answered {
        /// The source of the answer, from recvfrom.
        from: SocketAddr,
        /// Its content.
        answer: Answer,
    },
    /// Nothing in time.
    TimedOut,
    /// An error, ECONNREFUSED included.
    Failed {
        /// What was being done.
        stage: FlowStage,
        /// The error's number.
        errno: i32,
    },
}

/// A proxy that passes connections on to where they were going.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Relay {
    /// Its name in [`Relayed`].
    pub name: String,
    /// Its socket.
    pub bind: Bind,
    /// Which side of the sidecar it plays.
    pub direction: RelayDirection,
    /// Tell of each connection; to be left out when measuring.
    pub report: bool,
    /// Close both connections by a reset, leaving nothing in TIME_WAIT.
    pub reset: bool,
    /// How many threads accept.
    pub workers: usize,
}

/// Which side of the sidecar a relay plays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RelayDirection {
    /// Connects onwards as it is.
    Outbound,
    /// Connects onwards from 127.0.0.6 or ::6.
    Inbound,
    /// Connects onwards from the client's own address, with this mark (TPROXY).
    InboundTransparent {
        /// SO_MARK of the connection onwards.
        mark: u32,
    },
}

/// What a relay did with one connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Relayed {
    /// The relay.
    pub relay: String,
    /// What it was told was the original destination.
    pub original_dst: OriginalDst,
    /// Its own address on the client's connection.
    pub local: SocketAddr,
    /// The client's address, from accept.
    pub peer: SocketAddr,
    /// Why the connection was not passed on; none if it was.
    pub error: Option<String>,
}
