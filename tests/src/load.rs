//! Tens of thousands of connections. Each client sends the destination that it dialled, so that the proxy can check the
//! original destination.
//!
//! The processes are the binary `load` of this package. Unlike an actor, they report only totals.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::actor::binary::{ReadableCopy, locate};
use crate::testbed::{Ids, Sandbox};

/// The variable with the path of the executable.
pub const VARIABLE: &str = "INTERCEPT_LOAD";

/// The role of a process.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum LoadRole {
    /// A proxy that accepts and checks until its input ends.
    Accept(Accept),
    /// Clients. After their work, held connections stay open until the input ends.
    Dial(LoadDial),
}

/// A proxy that does not connect onwards.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Accept {
    /// The addresses to listen on, with SO_REUSEPORT, because one process may not have enough descriptors.
    pub addr: SocketAddr,
    /// The backlog of listen().
    pub backlog: i32,
    /// Whether connections stay open until the client closes.
    pub keep: bool,
    /// Whether to accept only on command.
    pub paused: bool,
}

/// Clients.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LoadDial {
    /// The destinations, in turn.
    pub to: Vec<SocketAddr>,
    /// The source of the first connection. The port increases.
    pub from: Option<SocketAddr>,
    /// The number of connections.
    pub count: u32,
    /// The number of threads.
    pub threads: u32,
    /// What each connection does.
    pub method: LoadMethod,
}

/// What a connection does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum LoadMethod {
    /// Sends its destination and waits for the answer. The proxy then closes, and the client calls getpeername().
    Answered,
    /// The same with the first bytes in the SYN, by `sendto(MSG_FASTOPEN)`.
    FastOpenSend,
    /// The same with the first bytes in the SYN, by TCP_FASTOPEN_CONNECT.
    FastOpenConnect,
    /// Sends its destination and closes at once.
    Early,
    /// The same with the first bytes in the SYN.
    EarlyFastOpen,
    /// Resets at once, or gives up if it is not established.
    Abandoned,
    /// Expects a refusal.
    Refused,
    /// As `Answered`, and stays open.
    Held,
}

/// The totals of a process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadTally {
    /// Connections without an error.
    pub right: u32,
    /// Connections that the client closed before it sent anything.
    pub silent: u32,
    /// Errors, with their number.
    pub wrong: BTreeMap<String, u32>,
}

/// A running process. Dropping it ends it.
#[derive(Debug)]
pub struct LoadProcess {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

/// A copy of the executable that every user may run.
pub fn program() -> Result<ReadableCopy> {
    ReadableCopy::of(&locate("load", VARIABLE)?)
}

impl LoadProcess {
    /// Starts a process. A proxy listens when this returns.
    pub fn start(program: &ReadableCopy, sandbox: &Sandbox, ids: Ids, role: &LoadRole) -> Result<Self> {
        let mut child = sandbox
            .command_as(program.path(), ids)?
            .arg(serde_json::to_string(role)?)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting a load process in {}", sandbox.netns.name()))?;
        let input = child.stdin.take();
        let output = child.stdout.take().context("a load process has no standard output")?;
        let mut process = Self { child, input, output: BufReader::new(output) };
        if matches!(role, LoadRole::Accept(_)) {
            process.line()?;
        }
        Ok(process)
    }

    /// Makes connections in a new process and waits for the totals.
    pub fn dial(program: &ReadableCopy, sandbox: &Sandbox, ids: Ids, dial: LoadDial) -> Result<LoadTally> {
        Self::start(program, sandbox, ids, &LoadRole::Dial(dial))?.tally()
    }

    /// Waits until clients have finished.
    pub fn tally(&mut self) -> Result<LoadTally> {
        let line = self.line()?;
        serde_json::from_str(&line).with_context(|| format!("understanding {line:?}"))
    }

    /// Lets a proxy accept.
    pub fn go(&mut self) -> Result<()> {
        self.tell("go").map(drop)
    }

    /// Stops a proxy from accepting.
    pub fn pause(&mut self) -> Result<()> {
        self.tell("pause").map(drop)
    }

    /// Makes a proxy check all open connections again.
    pub fn again(&mut self) -> Result<()> {
        self.tell("again").map(drop)
    }

    /// The totals of a proxy since the last call.
    pub fn seen(&mut self) -> Result<LoadTally> {
        Ok(serde_json::from_str(&self.tell("tally")?)?)
    }

    fn tell(&mut self, word: &str) -> Result<String> {
        let input = self.input.as_mut().context("a load process has no standard input")?;
        writeln!(input, "{word}").context("writing to a load process; has it died?")?;
        self.line()
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.output.read_line(&mut line).context("reading from a load process")? == 0 {
            bail!("a load process died; see its standard error");
        }
        Ok(line)
    }
}

impl Drop for LoadProcess {
    fn drop(&mut self) {
        drop(self.input.take());
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl LoadTally {
    /// Adds other totals.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        self.right += other.right;
        self.silent += other.silent;
        for (what, count) in other.wrong {
            *self.wrong.entry(what).or_default() += count;
        }
        self
    }

    /// Counts an error.
    pub fn complain(&mut self, what: String) {
        *self.wrong.entry(what).or_default() += 1;
    }
}

/// The first message of a client: its destination.
pub fn spell(dialled: SocketAddr) -> [u8; 18] {
    let ip = match dialled.ip() {
        std::net::IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        std::net::IpAddr::V6(v6) => v6,
    };
    let mut bytes = [0; 18];
    bytes[..16].copy_from_slice(&ip.octets());
    bytes[16..].copy_from_slice(&dialled.port().to_be_bytes());
    bytes
}

/// The reverse of [`spell`].
pub fn read(bytes: [u8; 18]) -> SocketAddr {
    let mut ip = [0; 16];
    ip.copy_from_slice(&bytes[..16]);
    let ip = std::net::Ipv6Addr::from(ip).to_canonical();
    SocketAddr::new(ip, u16::from_be_bytes([bytes[16], bytes[17]]))
}
