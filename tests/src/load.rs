//! Connections by the ten thousand, each of which says where it was dialled, so that the far end can tell whether its
//! original destination is right.
//!
//! The processes are this package's binary `load`. Unlike an actor's, their connections are told of in sums only.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::actor::binary::{ReadableCopy, locate};
use crate::testbed::{Ids, Sandbox};

/// The variable that says where the executable is.
pub const VARIABLE: &str = "INTERCEPT_LOAD";

/// What a process is.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum LoadRole {
    /// A proxy that accepts and compares, until its input ends.
    Accept(Accept),
    /// Clients, until their work is done; then the connections that are held stay until the input ends.
    Dial(LoadDial),
}

/// A proxy that goes no further.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Accept {
    /// Where it listens; with SO_REUSEPORT, since a process may not have descriptors for all.
    pub addr: SocketAddr,
    /// How many connections the kernel takes before they are accepted.
    pub backlog: i32,
    /// Keeps connections open until the client closes, rather than closing first.
    pub keep: bool,
    /// Accepts only when told to go.
    pub paused: bool,
}

/// Clients.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LoadDial {
    /// Where to, in turn.
    pub to: Vec<SocketAddr>,
    /// The source of the first; the port counts up.
    pub from: Option<SocketAddr>,
    /// How many connections.
    pub count: u32,
    /// How many at the same time.
    pub threads: u32,
    /// What happens on each.
    pub method: LoadMethod,
}

/// What happens on a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum LoadMethod {
    /// It says where it was dialled and waits for the verdict; then the proxy closes, and the client asks who its peer
    /// was.
    Answered,
    /// The same with the first bytes in the SYN, by `sendto(MSG_FASTOPEN)`.
    FastOpenSend,
    /// The same with the first bytes in the SYN, by TCP_FASTOPEN_CONNECT.
    FastOpenConnect,
    /// It says where it was dialled and closes at once.
    Early,
    /// The same with the first bytes in the SYN.
    EarlyFastOpen,
    /// It is reset at once, or given up when it is not even established.
    Abandoned,
    /// Nothing listens.
    Refused,
    /// As answered, and then kept.
    Held,
}

/// What a process tells.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadTally {
    /// Connections on which all was as it must be.
    pub right: u32,
    /// Accepted, and closed by the client before it said anything.
    pub silent: u32,
    /// What was not as it must be, and how often.
    pub wrong: BTreeMap<String, u32>,
}

/// A running process. Dropping it ends it.
#[derive(Debug)]
pub struct LoadProcess {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

/// Where the executable is for every user.
pub fn program() -> Result<ReadableCopy> {
    ReadableCopy::of(&locate("load", VARIABLE)?)
}

impl LoadProcess {
    /// Starts one. A proxy listens when this returns.
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
        let mut swarm = Self { child, input, output: BufReader::new(output) };
        if matches!(role, LoadRole::Accept(_)) {
            swarm.line()?;
        }
        Ok(swarm)
    }

    /// Makes connections in a process of their own, and waits for what comes of them.
    pub fn dial(program: &ReadableCopy, sandbox: &Sandbox, ids: Ids, dial: LoadDial) -> Result<LoadTally> {
        Self::start(program, sandbox, ids, &LoadRole::Dial(dial))?.tally()
    }

    /// Waits for clients that have done their work.
    pub fn tally(&mut self) -> Result<LoadTally> {
        let line = self.line()?;
        serde_json::from_str(&line).with_context(|| format!("understanding {line:?}"))
    }

    /// Lets a proxy accept.
    pub fn go(&mut self) -> Result<()> {
        self.tell("go").map(drop)
    }

    /// Keeps a proxy from accepting.
    pub fn pause(&mut self) -> Result<()> {
        self.tell("pause").map(drop)
    }

    /// Has a proxy ask anew on all connections that it keeps.
    pub fn again(&mut self) -> Result<()> {
        self.tell("again").map(drop)
    }

    /// What a proxy has seen since it was asked last.
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
    /// Adds another to it.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        self.right += other.right;
        self.silent += other.silent;
        for (what, count) in other.wrong {
            *self.wrong.entry(what).or_default() += count;
        }
        self
    }

    /// Counts one that went wrong.
    pub fn complain(&mut self, what: String) {
        *self.wrong.entry(what).or_default() += 1;
    }
}

/// What a client says first: where it was dialled.
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
