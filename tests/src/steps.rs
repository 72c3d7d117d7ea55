//! A list of socket calls that the binary `steps` of this package makes one after another in a pod. Tests compare the
//! result of each call between ways to capture.

pub mod compared;

use std::net::{IpAddr, SocketAddr};
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::actor::binary::{ReadableCopy, locate};
use crate::testbed::{Ids, Sandbox};

/// The variable with the path of the executable.
pub const VARIABLE: &str = "INTERCEPT_STEPS";

/// A call on the current socket: the one of the last [`Step::Open`] or [`Step::Use`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Step {
    /// socket(); sockets are numbered from 0.
    Open(SocketKind),
    /// Selects a socket by its number.
    Use(usize),
    /// SO_REUSEADDR.
    ReuseAddress,
    /// setsockopt() with these bytes as the value.
    Option {
        /// `SOL_*`.
        level: i32,
        /// The number of the option.
        name: i32,
        /// The value.
        value: Vec<u8>,
    },
    /// IP_UNICAST_IF or IPV6_UNICAST_IF with the name of an interface.
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
    /// Reads the [`crate::actor::Answer`] of a connection.
    Read,
    /// Sends a query on a connected datagram socket and reads the answer.
    Ask,
    /// Sends a query by sendto() and reads the answer.
    AskAt(SocketAddr),
    /// A question by sendto(): the source that the server saw.
    AskFor(SocketAddr),
    /// Questions to each of these by one sendmmsg(), and all answers, sorted.
    AskAll(Vec<SocketAddr>),
    /// The same as [`Step::AskAt`] with the interface in IP_PKTINFO or IPV6_PKTINFO.
    AskBy(SocketAddr, String),
    /// shutdown() of the sending side.
    Shutdown,
    /// close().
    Close,
}

/// A kind of socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SocketKind {
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6, also with IPv4-mapped addresses.
    Tcp6,
    /// UDP over IPv4.
    Udp4,
    /// UDP over IPv6, also with IPv4-mapped addresses.
    Udp6,
    /// MPTCP over IPv4.
    Mptcp4,
}

/// The result of a step as text. Ports that the kernel chose are `*`.
pub type StepOutcome = String;

/// Runs steps in a sandbox as a user.
///
/// # Errors
/// If the process cannot be started or fails.
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

/// An address, with `*` for a port that the kernel chose.
pub fn shown(addr: SocketAddr) -> StepOutcome {
    let ip = match addr.ip() {
        IpAddr::V6(ip) => format!("[{ip}]"),
        ip @ IpAddr::V4(_) => ip.to_string(),
    };
    // The kernel chooses ports from here on.
    if addr.port() >= 32768 { format!("{ip}:*") } else { format!("{ip}:{}", addr.port()) }
}
