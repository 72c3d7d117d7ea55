//! Istio's own check that interception works: a connection of the proxy's user to 127.0.0.6 (::6) must arrive at one of
//! the proxy's ports, and its original destination must be available there.
//!
//! The programs act by cgroup and by the socket's owner. So the check runs in a child process that joins a cgroup below
//! the pod's, enters the pod's network namespace and becomes the proxy's user.

mod probe;

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};

use crate::cgroup::CgroupDir;
use crate::netns::Netns;
use crate::pod_process::{LeafCgroup, PodProcess, receive};
use probe::{ProbeLeg, ProbeOutcome};

/// The parameters of a check.
#[derive(Clone, Copy, Debug)]
pub struct Probe {
    /// `-p`.
    pub proxy_port: u16,
    /// `-z`.
    pub inbound_port: u16,
    /// The destination port. Nothing needs to listen there.
    pub probe_port: u16,
    /// Time limit for the whole check.
    pub timeout: Duration,
    /// User id of the proxy, in the initial user namespace.
    pub uid: u32,
    /// Group id of the proxy, in the initial user namespace.
    pub gid: u32,
}

/// The result of a successful check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validated {
    /// The proxy's port at which the IPv4 connection arrived.
    pub v4: u16,
    /// The same for IPv6; `None` if the namespace has no `::1` or no `::6`.
    pub v6: Option<u16>,
}

/// Interception does not work, or cannot be checked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ValidationError {
    /// A connection did not arrive as required.
    #[error("validating interception: {from} to {to}: {seen}")]
    Failed {
        /// Source of the connection.
        from: IpAddr,
        /// Destination of the connection.
        to: SocketAddr,
        /// What happened instead.
        seen: ListenerFate,
    },
    /// Neither of the proxy's ports could be listened on.
    #[error(
        "validating interception: listening on {address} ports {proxy_port} and {inbound_port}; validate before the proxy starts"
    )]
    Listen {
        /// The address listened on.
        address: IpAddr,
        /// `-p`.
        proxy_port: u16,
        /// `-z`.
        inbound_port: u16,
        /// The error from the kernel for the second port.
        source: io::Error,
    },
    /// The child process cannot be set up.
    #[error("validating interception: {step}")]
    Setup {
        /// The step that failed.
        step: &'static str,
        /// The error from the kernel.
        source: io::Error,
    },
    /// The child process died without a report.
    #[error(
        "validating interception: the child process was killed; check whether the pod has reached its memory limit"
    )]
    Died,
}

/// What happened to a connection that should have been intercepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ListenerFate {
    /// The connection failed with this error.
    Refused(Errno),
    /// The connection was established with something else.
    Elsewhere,
    /// Neither happened before the time limit.
    Nothing,
    /// The connection arrived at this port, where SO_ORIGINAL_DST failed with this error.
    NoOriginal(u16, Errno),
    /// The connection arrived at this port with another original port.
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
            Self::Elsewhere => write!(out, "the connection was established, but not with the proxy's ports"),
            Self::Nothing => write!(out, "the connection neither arrived nor failed in time"),
            Self::NoOriginal(port, error) => write!(
                out,
                "the connection arrived at port {port}, but SO_ORIGINAL_DST failed there ({})",
                io::Error::from(error)
            ),
            Self::OtherPort(port, original) => {
                write!(
                    out,
                    "the connection arrived at port {port}, but SO_ORIGINAL_DST returned port {original} there"
                )
            }
        }
    }
}

/// Checks that connections in `cgroup` and `netns` are intercepted. Ports on which the proxy already listens cannot be
/// checked. If interception does not work, the check takes `probe.timeout`.
pub fn validate(netns: &Netns, cgroup: &CgroupDir, probe: &Probe) -> Result<Validated, ValidationError> {
    let setup = |step| move |source: io::Error| ValidationError::Setup { step, source };
    /// Time for the child to start and to report.
    const MARGIN: Duration = Duration::from_secs(2);
    let name = format!("validation-{}", std::process::id());
    let own = LeafCgroup::below(cgroup, &name).map_err(setup("creating a cgroup below the pod's"))?;
    let (reader, writer) =
        pipe_with(PipeFlags::CLOEXEC).map_err(|error| setup("creating a pipe")(error.into()))?;

    let child = probe::start(own.procs(), netns.as_fd(), writer.as_fd(), probe);
    let child = child.map_err(|error| setup("starting a process")(error.into()))?;
    drop(writer);
    let child = PodProcess(child);
    let report = receive(reader, probe.timeout.min(probe::LONGEST) + MARGIN)
        .map_err(setup("waiting for the child process"))?;
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

#[cfg(test)]
mod tests;
