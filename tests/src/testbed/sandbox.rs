//! A namespace with a cgroup, in which processes of a test run.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::{Cgroup, Namespace};

/// A user and a group, without supplementary groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Ids {
    /// The real, effective and saved user id.
    pub uid: u32,
    /// The real, effective and saved group id.
    pub gid: u32,
}

impl Ids {
    /// The superuser.
    pub const ROOT: Self = Self { uid: 0, gid: 0 };
    /// An application's user.
    pub const APP: Self = Self { uid: 1000, gid: 1000 };
    /// The sidecar proxy's user.
    pub const PROXY: Self = Self { uid: 1337, gid: 1337 };
}

/// A network namespace and the cgroup of the processes in it.
#[derive(Debug)]
pub struct Sandbox {
    /// The cgroup. Before the namespace, so that it is dropped first and the processes are gone by then.
    pub cgroup: Cgroup,
    /// The network namespace.
    pub netns: Namespace,
}

impl Sandbox {
    /// A new namespace without links, and a cgroup with the same label.
    pub fn new(label: &str) -> Result<Self> {
        Ok(Self { netns: Namespace::new(label)?, cgroup: Cgroup::new(label)? })
    }

    /// A command that runs here as root. It enters only the network namespace, so that mounts and cgroups stay
    /// visible.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Result<Command> {
        self.command_as(program, Ids::ROOT)
    }

    /// A command that runs here as another user, which needs the right to execute the program.
    pub fn command_as(&self, program: impl AsRef<OsStr>, ids: Ids) -> Result<Command> {
        let procs = self.cgroup.path().join("cgroup.procs");
        let procs: OwnedFd = File::options()
            .write(true)
            .open(&procs)
            .with_context(|| format!("opening {}", procs.display()))?
            .into();
        let netns = self.netns.as_fd().try_clone_to_owned()?;
        let mut command = Command::new(program);
        // SAFETY: between fork and exec the closure makes system calls only; it neither allocates nor locks.
        unsafe {
            command.pre_exec(move || enter(&procs, &netns, ids));
        }
        Ok(command)
    }
}

fn enter(procs: &OwnedFd, netns: &OwnedFd, ids: Ids) -> std::io::Result<()> {
    rustix::io::write(procs, b"0")?;
    let check = |result: libc::c_int| match result {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    };
    // SAFETY: plain system calls on descriptors and numbers this function was given; the process has one thread.
    unsafe {
        check(libc::setns(netns.as_raw_fd(), libc::CLONE_NEWNET))?;
        if ids != Ids::ROOT {
            check(libc::setgroups(0, std::ptr::null()))?;
            check(libc::setresgid(ids.gid, ids.gid, ids.gid))?;
            check(libc::setresuid(ids.uid, ids.uid, ids.uid))?;
        }
    }
    Ok(())
}
