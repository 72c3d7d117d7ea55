//! A list of socket calls that the binary `steps` of this package makes one after another in a pod. Tests compare the
//! result of each call between ways to capture.

pub mod compared;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::process::{Child, ChildStdout, Stdio};

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
    /// As [`Step::Open`] of TCP over IPv4, until the decision on a socket is kept in the same cell as that of the socket with
    /// this number (SHADOW_DIALS). The others are closed.
    OpenMeeting(usize),
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
    /// Sends a byte.
    Send,
    /// Reads the [`crate::actor::Answer`] of a connection.
    Read,
    /// Sends a query on a connected datagram socket and reads the answer.
    Ask,
    /// Reads another answer to it.
    Receive,
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
    /// Waits until [`RunningSteps::resume`].
    Pause,
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

/// Steps of which some are done. Dropping it kills the process.
#[derive(Debug)]
pub struct RunningSteps {
    child: Child,
    said: BufReader<ChildStdout>,
    // Removed when it is dropped.
    _program: ReadableCopy,
}

/// Runs steps in a sandbox as a user.
///
/// # Errors
/// If the process cannot be started or fails.
pub fn run(sandbox: &Sandbox, ids: Ids, steps: &[Step]) -> Result<Vec<StepOutcome>> {
    start(sandbox, ids, "", steps)?.finish()
}

/// Starts steps in a sandbox as a user, by a shell after the command `before`.
///
/// # Errors
/// If the process cannot be started.
pub fn start(sandbox: &Sandbox, ids: Ids, before: &str, steps: &[Step]) -> Result<RunningSteps> {
    let program = ReadableCopy::of(&locate("steps", VARIABLE)?)?;
    let mut child = sandbox
        .command_as("sh", ids)?
        .args(["-c", &format!("{before}\nexec \"$0\" \"$1\"")])
        .arg(program.path())
        .arg(serde_json::to_string(steps)?)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("starting steps")?;
    let said = BufReader::new(child.stdout.take().context("steps has no standard output")?);
    Ok(RunningSteps { child, said, _program: program })
}

impl RunningSteps {
    /// Waits until all steps before the next [`Step::Pause`] are done.
    ///
    /// # Errors
    /// If the process has ended.
    pub fn await_pause(&mut self) -> Result<()> {
        let mut line = String::new();
        self.said.read_line(&mut line)?;
        ensure!(line == "paused\n", "steps said {line:?}");
        Ok(())
    }

    /// Goes on after a [`Step::Pause`].
    ///
    /// # Errors
    /// If the process has ended.
    pub fn resume(&mut self) -> Result<()> {
        let input = self.child.stdin.as_mut().context("steps has no standard input")?;
        input.write_all(b"\n").context("steps has ended")
    }

    /// The outcomes of all steps. Those after a [`Step::Pause`] are done as well.
    ///
    /// # Errors
    /// If the process fails.
    pub fn finish(mut self) -> Result<Vec<StepOutcome>> {
        drop(self.child.stdin.take());
        let mut outcomes = Vec::new();
        self.said.read_to_end(&mut outcomes)?;
        let status = self.child.wait()?;
        ensure!(status.success(), "steps: {status}; see its standard error");
        serde_json::from_slice(&outcomes).context("understanding steps")
    }
}

impl Drop for RunningSteps {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
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
