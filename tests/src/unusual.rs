//! One flow made in an unusual way, by a process of its own: this package's binary `unusual`.
//!
//! The socket is made first and used only when told to, so that anything may happen in between.

pub mod fixture;

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::actor::binary::{ReadableCopy, locate};
use crate::testbed::{Ids, Sandbox};

/// The variable that says where the executable is.
pub const VARIABLE: &str = "INTERCEPT_UNUSUAL";

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnusualSocket {
    /// How.
    pub method: Method,
    /// Who makes the socket. In a user namespace of its own these are ids inside.
    pub made_by: Ids,
    /// Who uses it.
    pub used_by: Ids,
    /// Where to; datagrams go to all of them.
    pub to: Vec<SocketAddr>,
    /// Run in a user namespace in which these ids outside are 0 and what follows it.
    pub user_namespace: Option<u32>,
}

/// How a flow is made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Method {
    /// connect().
    Plain,
    /// The socket goes to another process by SCM_RIGHTS, which connects it.
    Passed,
    /// The socket is made and connected by a program with the set-user-ID and set-group-ID bits of `made_by`, started
    /// by `used_by`.
    SetUserId,
    /// By an io_uring.
    IoUring,
    /// sendto(MSG_FASTOPEN).
    FastOpenSend,
    /// TCP_FASTOPEN_CONNECT.
    FastOpenConnect,
    /// A socket of MPTCP.
    Multipath,
    /// SO_MARK.
    Mark(u32),
    /// SO_BINDTODEVICE.
    Device(String),
    /// A datagram by a raw socket, from this address, with the UDP header made by hand.
    Raw(IpAddr),
    /// Datagrams from one socket, each sent when the one before has been answered.
    InTurn,
    /// Datagrams from one socket, all sent before the first answer is read.
    AtOnce,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnusualOutcome {
    /// For each destination (of connections: the one) who answered, or what failed.
    pub servers: Vec<std::result::Result<String, String>>,
    /// Whom the client sees: getpeername, or the sources of the answers.
    pub peers: Vec<SocketAddr>,
    /// The client's own address.
    pub own: Option<SocketAddr>,
}

impl UnusualSocket {
    /// A connection, made and used by the application.
    pub fn new(method: Method, to: SocketAddr) -> Self {
        Self { method, made_by: Ids::APP, used_by: Ids::APP, to: vec![to], user_namespace: None }
    }
}

impl UnusualOutcome {
    /// Who answered the first, or what failed.
    pub fn server(&self) -> &str {
        match self.servers.first() {
            Some(Ok(text) | Err(text)) => text,
            None => "nobody was asked",
        }
    }
}

/// A process that has made its socket and waits.
#[derive(Debug)]
pub struct UnusualProcess {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    // The file must be there until the process is done: it starts itself again.
    _program: ReadableCopy,
}

impl UnusualProcess {
    /// Starts it in a place.
    pub fn start(sandbox: &Sandbox, unusual: &UnusualSocket) -> Result<Self> {
        let program = ReadableCopy::of(&locate("unusual", VARIABLE)?)?;
        let mut child = sandbox
            .command(program.path())?
            .arg(serde_json::to_string(unusual)?)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting the process")?;
        let input = child.stdin.take().context("slip has no standard input")?;
        let output = BufReader::new(child.stdout.take().context("slip has no standard output")?);
        let mut process = Self { child, input, output, _program: program };
        let line = process.line()?;
        ensure!(line == "ready\n", "slip is not ready for {unusual:?}: {line:?}; see its standard error");
        Ok(process)
    }

    /// Tells it to go, and what came of it.
    pub fn go(mut self) -> Result<UnusualOutcome> {
        self.input.write_all(b"\n").context("telling it to go")?;
        serde_json::from_str(&self.line()?).context("understanding slip; see its standard error")
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.output.read_line(&mut line).context("reading what slip says")?;
        Ok(line)
    }
}

impl Drop for UnusualProcess {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
