//! A flow that is not a plain connect() or sendto(), made by the binary `unusual` of this package.
//!
//! The process makes the socket, and uses it later on command, so that a test can capture the pod in between.

pub mod fixture;

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::actor::binary::{ReadableCopy, locate};
use crate::testbed::{Ids, Sandbox};

/// The variable with the path of the executable.
pub const VARIABLE: &str = "INTERCEPT_UNUSUAL";

/// The flow to make.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnusualSocket {
    /// The method.
    pub method: Method,
    /// The user that makes the socket. With a user namespace, ids inside it.
    pub made_by: Ids,
    /// The user that uses the socket.
    pub used_by: Ids,
    /// The destinations. Connections use the first, datagrams all.
    pub to: Vec<SocketAddr>,
    /// Run in a user namespace in which ids from 0 are these ids outside.
    pub user_namespace: Option<u32>,
}

/// A method to make a flow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Method {
    /// connect().
    Plain,
    /// Another process receives the socket by SCM_RIGHTS and connects it.
    Passed,
    /// A program with the set-user-ID and set-group-ID bits of `made_by`, started by `used_by`, makes and connects the
    /// socket.
    SetUserId,
    /// connect() by io_uring.
    IoUring,
    /// sendto(MSG_FASTOPEN).
    FastOpenSend,
    /// TCP_FASTOPEN_CONNECT.
    FastOpenConnect,
    /// An MPTCP socket.
    Multipath,
    /// SO_MARK.
    Mark(u32),
    /// SO_BINDTODEVICE.
    Device(String),
    /// A datagram from this address by a raw socket, with a UDP header that the program writes.
    Raw(IpAddr),
    /// Datagrams from one socket, each sent after the previous answer.
    InTurn,
    /// Datagrams from one socket, all sent before the first answer is read.
    AtOnce,
}

/// The result of a flow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnusualOutcome {
    /// For each destination, the server that answered or the error.
    pub servers: Vec<std::result::Result<String, String>>,
    /// The peers that the client sees: getpeername, or the sources of the answers.
    pub peers: Vec<SocketAddr>,
    /// getsockname of the client.
    pub own: Option<SocketAddr>,
}

impl UnusualSocket {
    /// A connection that the application makes and uses.
    pub fn new(method: Method, to: SocketAddr) -> Self {
        Self { method, made_by: Ids::APP, used_by: Ids::APP, to: vec![to], user_namespace: None }
    }
}

impl UnusualOutcome {
    /// The server that answered first, or the error.
    pub fn server(&self) -> &str {
        match self.servers.first() {
            Some(Ok(text) | Err(text)) => text,
            None => "nobody was asked",
        }
    }
}

/// A process that has made its socket and waits for the command to use it.
#[derive(Debug)]
pub struct UnusualProcess {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    // The process starts itself again, so the file must exist until it ends.
    _program: ReadableCopy,
}

impl UnusualProcess {
    /// Starts the process in a sandbox.
    pub fn start(sandbox: &Sandbox, unusual: &UnusualSocket) -> Result<Self> {
        let program = ReadableCopy::of(&locate("unusual", VARIABLE)?)?;
        let mut child = sandbox
            .command(program.path())?
            .arg(serde_json::to_string(unusual)?)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting the process")?;
        let input = child.stdin.take().context("the process has no standard input")?;
        let output = BufReader::new(child.stdout.take().context("the process has no standard output")?);
        let mut process = Self { child, input, output, _program: program };
        let line = process.line()?;
        ensure!(
            line == "ready\n",
            "the process is not ready for {unusual:?}: {line:?}; see its standard error"
        );
        Ok(process)
    }

    /// Uses the socket, and returns the result.
    pub fn go(mut self) -> Result<UnusualOutcome> {
        self.input.write_all(b"\n").context("telling it to go")?;
        serde_json::from_str(&self.line()?)
            .context("reading the result; see the standard error of the process")
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.output.read_line(&mut line).context("reading the output of the process")?;
        Ok(line)
    }
}

impl Drop for UnusualProcess {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
