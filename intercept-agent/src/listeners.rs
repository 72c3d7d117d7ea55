//! Sockets of the proxy that listened before the programs were attached, and so did not register themselves: found by
//! sock_diag (`diag.rs`), and taken from the processes that have them (`descriptors.rs`).

mod descriptors;
mod diag;
mod watch;

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, SocketAddr},
    os::fd::OwnedFd,
};

use intercept_common::{Addr, Family};
use rustix::process::Pid;

use crate::{
    cgroup::{CgroupDir, CgroupError},
    netns::{Netns, NetnsError},
};

pub use watch::PortWatch;

/// A listening TCP socket, shared with the process that has it.
#[derive(Debug)]
pub struct Listener {
    /// Of the socket, which if IPv6 may accept IPv4 as well.
    pub family: Family,
    /// What it is bound to; unspecified for all addresses.
    pub addr: IpAddr,
    /// Host order.
    pub port: u16,
    /// Names the socket among all that are open.
    pub inode: u64,
    /// The process that has it, as this one sees it.
    pub pid: Pid,
    /// The same socket: closing it leaves the other's open, and the other closing it leaves this open.
    pub fd: OwnedFd,
}

impl Listener {
    /// Whether it is bound to 127.0.0.1 or ::1 itself.
    pub fn is_localhost(&self) -> bool {
        Addr::from(self.addr).is_localhost()
    }
}

/// A listening socket that could not be had.
#[derive(Debug)]
pub struct Missed {
    /// What it is bound to.
    pub address: SocketAddr,
    /// Why; `None` when no process that can be seen has it.
    pub cause: Option<io::Error>,
}

/// All that listens on the ports asked for.
#[derive(Debug, Default)]
pub struct FoundListeners {
    /// By inode, all of a group that shares a port by SO_REUSEPORT among them.
    pub listeners: Vec<Listener>,
    /// Worth a warning: what comes in for these ports will not reach them.
    pub missed: Vec<Missed>,
}

/// Why it cannot be said what listens.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListenersError {
    /// The sockets of the namespace cannot be listed.
    #[error("listing the listening TCP sockets of network namespace {netns}")]
    List {
        /// Path of the namespace.
        netns: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The namespace cannot be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The cgroup cannot be read.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

/// Finds what listens on `ports` in `netns`. The processes of `cgroups` are asked first, then all others that are in
/// the namespace.
pub fn find(netns: &Netns, cgroups: &[&CgroupDir], ports: &[u16]) -> Result<FoundListeners, ListenersError> {
    let wanted = diag::listening(netns, |port| ports.contains(&port))?;
    if wanted.is_empty() {
        return Ok(FoundListeners::default());
    }
    Ok(descriptors::take(netns, processes(cgroups)?, wanted))
}

/// Finds what the processes of `cgroups` have that listens on ports other than `except`: of a machine's applications. What
/// other processes have is missing rather than missed. Of some listeners a time limit of seconds may leave them missed.
pub fn find_all(
    netns: &Netns,
    cgroups: &[&CgroupDir],
    except: &[u16],
) -> Result<FoundListeners, ListenersError> {
    let wanted = diag::listening(netns, |port| !except.contains(&port))?;
    if wanted.is_empty() {
        return Ok(FoundListeners::default());
    }
    Ok(descriptors::take_from(processes(cgroups)?, wanted))
}

/// The ports on which processes with this name listen in `netns`: those that are found; none if the sockets cannot be listed.
pub fn ports_of(netns: &Netns, process: &str) -> BTreeSet<u16> {
    let Ok(wanted) = diag::listening(netns, |_| true) else { return BTreeSet::new() };
    let inodes = descriptors::sockets_of(process);
    wanted
        .into_iter()
        .filter(|(inode, _)| inodes.contains(inode))
        .map(|(_, address)| address.port())
        .collect()
}

fn processes(cgroups: &[&CgroupDir]) -> Result<Vec<Pid>, CgroupError> {
    let mut found = Vec::new();
    for cgroup in cgroups {
        match cgroup.processes() {
            Ok(processes) => found.extend(processes),
            // Then nobody is found to have them, which is reported socket by socket.
            Err(CgroupError::Hidden { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests;
