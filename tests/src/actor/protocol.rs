//! The messages to and from the actor, one JSON document per line.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{deadline::scaled, testbed::Ids};

/// A line to the actor.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Request {
    /// Identifies the reply.
    pub id: u64,
    /// The job to do.
    pub job: ActorJob,
}

/// A job of the actor.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum ActorJob {
    /// Answer connections or datagrams until closed.
    Listen(Listen),
    /// Relay connections until closed.
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
        /// The id of the request.
        id: u64,
        /// The result.
        done: Done,
    },
    /// A relay has connected one connection onwards, or failed to.
    Relayed(Relayed),
}

/// The result of a request.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Done {
    /// A listener or relay is ready at this address.
    Ready(SocketAddr),
    /// A listener or relay is closed.
    Closed,
    /// The result of [`ActorJob::Dial`].
    Dialled(Dialled),
    /// The result of [`ActorJob::Query`].
    Queried(Queried),
    /// The job could not be started.
    Failed(String),
}

/// The options of a listening socket.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Bind {
    /// The owner of the socket.
    pub ids: Ids,
    /// The address to bind.
    pub addr: SocketAddr,
    /// IPV6_V6ONLY.
    pub v6only: bool,
    /// SO_REUSEPORT.
    pub reuseport: bool,
    /// IP_TRANSPARENT, which TPROXY needs.
    pub transparent: bool,
}

impl Bind {
    /// An ordinary socket for one family.
    pub fn new(ids: Ids, addr: SocketAddr) -> Self {
        Self { ids, addr, v6only: true, reuseport: false, transparent: false }
    }
}

/// The transport protocol of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Transport {
    /// The server answers each connection with one [`Answer`] as a line of JSON.
    Tcp,
    /// The server answers each datagram with one [`Answer`], from the address that it was sent to.
    Udp,
}

/// A server that reports its name and what it sees.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Listen {
    /// The name of the server.
    pub name: String,
    /// The transport protocol.
    pub transport: Transport,
    /// The listening socket.
    pub bind: Bind,
}

/// What a server saw of a connection or datagram.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The name of the server.
    pub server: String,
    /// SO_ORIGINAL_DST of the connection. `None` for datagrams.
    pub original_dst: Option<OriginalDst>,
    /// The server's address: getsockname, or the destination of the datagram.
    pub local: SocketAddr,
    /// The client's address, from accept or recvmsg.
    pub peer: SocketAddr,
    /// The client's address, from getpeername. `None` for datagrams.
    pub peername: Option<SocketAddr>,
    /// The number at the beginning of the datagram. 0 for connections.
    pub nonce: u64,
}

/// The result of SO_ORIGINAL_DST (IP6T_SO_ORIGINAL_DST for IPv6).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum OriginalDst {
    /// An address.
    Addr(SocketAddr),
    /// An errno, such as 2 (ENOENT) or 92 (ENOPROTOOPT).
    Errno(i32),
}

/// A connection to make.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Dial {
    /// The user that connects.
    pub ids: Ids,
    /// The destination.
    pub to: SocketAddr,
    /// The source address to bind.
    pub from: Option<IpAddr>,
    /// Whether an IPv6 socket makes the IPv4 connection.
    pub mapped: bool,
    /// How long to wait for the connection, and again for the answer.
    pub timeout: Duration,
}

impl Dial {
    /// A plain connection with a timeout of three seconds on hardware.
    pub fn new(ids: Ids, to: SocketAddr) -> Self {
        Self { ids, to, from: None, mapped: false, timeout: scaled(Duration::from_secs(3)) }
    }
}

/// What a client saw. The addresses are those of the system calls: IPv4 on an IPv6 socket is ::ffff:a.b.c.d.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dialled {
    /// The result.
    pub outcome: DialOutcome,
    /// getsockname after connect().
    pub sockname: Option<SocketAddr>,
    /// getpeername after connect().
    pub peername: Option<SocketAddr>,
    /// getpeername after the answer.
    pub peername_after: Option<SocketAddr>,
}

/// How a connection ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DialOutcome {
    /// A server answered.
    Answered(Answer),
    /// The answer was not an [`Answer`].
    Garbled(String),
    /// ECONNREFUSED.
    Refused,
    /// ECONNRESET, or the end of the stream before the answer.
    Dropped(FlowStage),
    /// The timeout passed.
    TimedOut(FlowStage),
    /// Another error.
    Failed {
        /// The failed step.
        stage: FlowStage,
        /// The errno.
        errno: i32,
    },
}

/// A step of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FlowStage {
    /// socket() and setsockopt().
    Socket,
    /// bind().
    Bind,
    /// connect().
    Connect,
    /// sendto(), send() or sendmmsg().
    Send,
    /// Waiting for the answer.
    Read,
}

/// How datagrams are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Sending {
    /// sendto() on an unconnected socket.
    To,
    /// connect() and send(), for a single destination.
    Connected,
    /// One sendmmsg() for all destinations.
    Many,
}

/// Datagrams to send from one socket, one for each destination.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Query {
    /// The user that sends.
    pub ids: Ids,
    /// The destination.
    pub to: Vec<SocketAddr>,
    /// The source address to bind.
    pub from: Option<IpAddr>,
    /// Whether an IPv6 socket sends to IPv4 addresses.
    pub mapped: bool,
    /// The system calls to use.
    pub sending: Sending,
    /// How long to wait for the answers.
    pub timeout: Duration,
}

impl Query {
    /// One datagram by sendto() with a timeout of one second on hardware.
    pub fn new(ids: Ids, to: SocketAddr) -> Self {
        let timeout = scaled(Duration::from_secs(1));
        Self { ids, to: vec![to], from: None, mapped: false, sending: Sending::To, timeout }
    }
}

/// What the sender of datagrams saw.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Queried {
    /// The reply of each destination.
    pub replies: Vec<QueryReply>,
    /// getsockname after sending.
    pub sockname: Option<SocketAddr>,
    /// getpeername of a connected socket.
    pub peername: Option<SocketAddr>,
}

/// The reply to one datagram.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum QueryReply {
    /// An answer.
    Answered {
        /// The source address of the answer, from recvfrom().
        from: SocketAddr,
        /// The content of the answer.
        answer: Answer,
    },
    /// The timeout passed.
    TimedOut,
    /// An error, also ECONNREFUSED.
    Failed {
        /// The failed step.
        stage: FlowStage,
        /// The errno.
        errno: i32,
    },
}

/// A proxy that relays connections to their original destination.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Relay {
    /// The name in [`Relayed`].
    pub name: String,
    /// The listening socket.
    pub bind: Bind,
    /// The side of the sidecar that it plays.
    pub direction: RelayDirection,
    /// Whether to report each connection. Off in measurements.
    pub report: bool,
    /// Whether to close both connections by a reset, so that none stays in TIME_WAIT.
    pub reset: bool,
    /// The number of accepting threads.
    pub workers: usize,
}

/// The side of the sidecar that a relay plays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RelayDirection {
    /// Connects onwards without binding a source.
    Outbound,
    /// Connects onwards from 127.0.0.6 or ::6.
    Inbound,
    /// Connects onwards from the client's own address, with this mark (TPROXY).
    InboundTransparent {
        /// SO_MARK of the onward connection.
        mark: u32,
    },
}

/// What a relay did with one connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Relayed {
    /// The name of the relay.
    pub relay: String,
    /// SO_ORIGINAL_DST of the client's connection.
    pub original_dst: OriginalDst,
    /// getsockname of the client's connection.
    pub local: SocketAddr,
    /// The client's address, from accept.
    pub peer: SocketAddr,
    /// Why the connection was not relayed. `None` if it was.
    pub error: Option<String>,
}
