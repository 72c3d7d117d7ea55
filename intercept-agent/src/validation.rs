//! Istio's own check that interception works: what the proxy's user sends to 127.0.0.6 (::6) has to arrive at one
//! of the proxy's ports, and its original destination has to be told there.
//!
//! The programs apply by cgroup and go by the owner of a socket, so the check runs in a process of its own that
//! joins a cgroup below the pod's, enters the namespace and becomes the proxy's user.

mod probe;

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, pidfd_open, pidfd_send_signal, waitpid};

use crate::cgroup::CgroupDir;
use crate::netns::Netns;
use probe::{ProbeLeg, ProbeOutcome};

/// What to check.
#[derive(Clone, Copy, Debug)]
pub struct Probe {
    /// `-p`.
    pub proxy_port: u16,
    /// `-z`.
    pub inbound_port: u16,
    /// The port dialled; nothing needs to listen there.
    pub probe_port: u16,
    /// For everything together.
    pub timeout: Duration,
    /// Of the proxy, in the initial user namespace.
    pub uid: u32,
    /// Of the proxy, in the initial user namespace.
    pub gid: u32,
}

/// Interception works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validated {
    /// The port where the IPv4 connection arrived.
    pub v4: u16,
    /// The same for IPv6; `None` where the namespace has no `::1` or no `::6`.
    pub v6: Option<u16>,
}

/// Interception does not work, or could not be checked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ValidationError {
    /// The connection did not arrive as it should.
    #[error("validating interception: {from} to {to}: {seen}")]
    Failed {
        /// Source of the connection.
        from: IpAddr,
        /// What was dialled.
        to: SocketAddr,
        /// What happened instead.
        seen: ListenerFate,
    },
    /// Nothing could be listened on.
    #[error(
        "validating interception: listening on {address} ports {proxy_port} and {inbound_port}; validate before the proxy starts"
    )]
    Listen {
        /// Where.
        address: IpAddr,
        /// `-p`.
        proxy_port: u16,
        /// `-z`.
        inbound_port: u16,
        /// What the kernel said of the last.
        source: io::Error,
    },
    /// The process of the check could not be set up.
    #[error("validating interception: {step}")]
    Setup {
        /// What was attempted.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The process of the check ended without a word.
    #[error("validating interception: the process of the check was ended; is the pod short of memory?")]
    Died,
}

/// What happened to a connection that should have been intercepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ListenerFate {
    /// It could not be made: what the kernel said.
    Refused(Errno),
    /// It was made, but to something else.
    Elsewhere,
    /// Neither of these in time.
    Nothing,
    /// It arrived at this port, and its original destination was not to be had: what the kernel said.
    NoOriginal(u16, Errno),
    /// It arrived at this port, with another original port.
    OtherPort(u16, u16),
}

impl fmt::Display for ListenerFate {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Refused(error) => {
                write!(
                    out,
                    "the connection failed ({}): it was not redirected to the proxy",
                    io::Error::from(error)
                )
            }
            Self::Elsewhere => write!(out, "the connection was made, but not to the proxy's ports"),
            Self::Nothing => write!(out, "the connection neither arrived nor failed in time"),
            Self::NoOriginal(port, error) => write!(
                out,
                "arrived at port {port}, but SO_ORIGINAL_DST failed there ({})",
                io::Error::from(error)
            ),
            Self::OtherPort(port, original) => {
                write!(out, "arrived at port {port}, but SO_ORIGINAL_DST told port {original} there")
            }
        }
    }
}

/// Checks that what is attached to `cgroup` and `netns` intercepts. Ports that the proxy listens on already cannot
/// be checked. Takes until `probe.timeout` when it does not work.
pub fn validate(netns: &Netns, cgroup: &CgroupDir, probe: &Probe) -> Result<Validated, ValidationError> {
    let setup = |step| move |source: io::Error| ValidationError::Setup { step, source };
    let own = OwnCgroup::below(cgroup).map_err(setup("making a cgroup below the pod's"))?;
    let procs = OpenOptions::new().write(true).open(own.0.join("cgroup.procs"));
    let procs = procs.map_err(setup("opening a cgroup below the pod's"))?;
    let (reader, writer) =
        pipe_with(PipeFlags::CLOEXEC).map_err(|error| setup("making a pipe")(error.into()))?;

    let child = probe::start(procs.as_fd(), netns.as_fd(), writer.as_fd(), probe);
    let child = child.map_err(|error| setup("starting a process")(error.into()))?;
    drop(writer);
    let child = Child(child);
    let report = receive(reader, probe.timeout).map_err(setup("waiting for the process of the check"))?;
    drop(child);
    drop(own);

    let mut ports = [None; 2];
    for (leg, port) in ProbeLeg::BOTH.into_iter().zip(&mut ports) {
        let outcome = report.get(leg as usize * ProbeOutcome::SIZE..).and_then(ProbeOutcome::decode);
        let listen = |error: Errno| ValidationError::Listen {
            address: leg.source(),
            proxy_port: probe.proxy_port,
            inbound_port: probe.inbound_port,
            source: error.into(),
        };
        match outcome.ok_or(ValidationError::Died)? {
            ProbeOutcome::Passed(at) => *port = Some(at),
            ProbeOutcome::Absent => {}
            ProbeOutcome::Failed(seen) => {
                let to = SocketAddr::new(leg.destination(), probe.probe_port);
                return Err(ValidationError::Failed { from: leg.source(), to, seen });
            }
            ProbeOutcome::Listen(error) => return Err(listen(error)),
            ProbeOutcome::Setup(step, error) => return Err(setup(step.text())(error.into())),
        }
    }
    let [v4, v6] = ports;
    Ok(Validated { v4: v4.ok_or(ValidationError::Died)?, v6 })
}

/// Reads until the other end closes; what came when that takes too long.
fn receive(reader: OwnedFd, timeout: Duration) -> io::Result<Vec<u8>> {
    /// For the child to start and to say what it saw.
    const MARGIN: Duration = Duration::from_secs(2);
    let patience = Timespec::try_from(timeout.min(probe::LONGEST) + MARGIN).map_err(io::Error::other)?;
    let ready = loop {
        match poll(&mut [PollFd::new(&reader, PollFlags::IN)], Some(&patience)) {
            Err(Errno::INTR) => {}
            ready => break ready?,
        }
    };
    let mut report = Vec::new();
    if ready > 0 {
        // One write of the child's, or none and the end.
        std::fs::File::from(reader).take(64).read_to_end(&mut report)?;
    }
    Ok(report)
}

/// A cgroup for the check: the pod's may have children, and then takes no process itself.
struct OwnCgroup(PathBuf);

impl OwnCgroup {
    fn below(cgroup: &CgroupDir) -> io::Result<Self> {
        let path = cgroup.path().join(format!("intercept-validation-{}", std::process::id()));
        match fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => Ok(Self(path)),
        }
    }
}

impl Drop for OwnCgroup {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.0) {
            tracing::warn!(cgroup = %self.0.display(), %error, "removing the cgroup of the check");
        }
    }
}

/// The process of the check, ended and collected when dropped.
struct Child(Pid);

impl Drop for Child {
    fn drop(&mut self) {
        // Not collected yet, so the number is still its own.
        if let Ok(process) = pidfd_open(self.0, PidfdFlags::empty()) {
            _ = pidfd_send_signal(process, Signal::KILL);
        }
        while matches!(waitpid(Some(self.0), WaitOptions::empty()), Err(Errno::INTR)) {}
    }
}

#[cfg(test)]
mod tests;
