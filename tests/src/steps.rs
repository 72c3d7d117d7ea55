//! A program of socket calls, made one after the other by one process of a pod: this package's binary `steps`. What each
//! call gave is compared between ways of capturing.

pub mod compared;

use std::net::{IpAddr, SocketAddr};
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::actor::binary::{ReadableCopy, locate};
use crate::testbed::{Ids, Sandbox};

/// The variable that says where the executable is.
pub const VARIABLE: &str = "INTERCEPT_STEPS";

/// A call, on the socket that the last [`Step::Open`] made or [`Step::Use`] chose.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Step {
    /// socket(); sockets are numbered from 0.
    Open(SocketKind),
    /// Choose a socket by its number.
    Use(usize),
    /// SO_REUSEADDR.
    ReuseAddress,
    /// An option whose value is these bytes.
    Option {
        /// `SOL_*`.
        level: i32,
        /// Number of the option.
        name: i32,
        /// Its value.
        value: Vec<u8>,
    },
    /// IP_UNICAST_IF or IPV6_UNICAST_IF, by the name of the interface.
    UnicastInterface(String),
    /// bind().
    Bind(SocketAddr),
    /// connect().
    Connect(SocketAddr),
    /// connect(AF_UNSPEC).
    Disconnect,
    /// O_NONBLOCK.
    Nonblocking,
    /// Waits for the connection that a non-blocking connect() began; SO_ERROR. The socket blocks again then.
    AwaitConnection,
    /// sendto() with MSG_FASTOPEN.
    FastOpen(SocketAddr),
    /// getsockname().
    Name,
    /// getpeername().
    Peer,
    /// The [`crate::actor::Answer`] of a connection.
    Read,
    /// A question to the peer of a connected datagram socket, and the answer.
    Ask,
    /// A question by sendto(), and the answer.
    AskAt(SocketAddr),
    /// A question by sendto(): the source that the server saw.
    AskFor(SocketAddr),
    /// Questions to each of these by one sendmmsg(), and all answers, sorted.
    AskAll(Vec<SocketAddr>),
    /// The same as [`Step::AskAt`] with the interface in IP_PKTINFO or IPV6_PKTINFO.
    AskBy(SocketAddr, String),
    /// Shuts the sending side down.
    Shutdown,
    /// close().
    Close,
}

/// What a socket is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SocketKind {
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6, or IPv4 by mapped addresses.
    Tcp6,
    /// UDP over IPv4.
    Udp4,
    /// UDP over IPv6, or IPv4 by mapped addresses.
    Udp6,
    /// MPTCP over IPv4.
    Mptcp4,
}

/// What a step gave, for people: ports that the kernel chose are `*`.
pub type StepOutcome = String;

/// Runs steps in a place, as a user.
///
/// # Errors
/// If the process cannot be started, or does not come to its end.
pub fn run(sandbox: &Sandbox, ids: Ids, steps: &[Step]) -> Result<Vec<StepOutcome>> {
    let program = ReadableCopy::of(&locate("steps", VARIABLE)?)?;
    let output = sandbox
        .command_as(program.path(), ids)?
        .arg(serde_json::to_string(steps)?)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("starting steps")?;
    ensure!(output.status.success(), "steps: {}; see its standard error", output.status);
    serde_json::from_slice(&output.stdout).context("understanding steps")
}

/// An address without the port, if the kernel chose it.
pub fn shown(addr: SocketAddr) -> StepOutcome {
    let ip = match addr.ip() {
        IpAddr::V6(ip) => format!("[{ip}]"),
        ip @ IpAddr::V4(_) => ip.to_string(),
    };
    // The range that the kernel chooses from begins here.
    if addr.port() >= 32768 { format!("{ip}:*") } else { format!("{ip}:{}", addr.port()) }
}
