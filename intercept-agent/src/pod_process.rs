//! A short-lived child process inside a pod: its cgroup, its report, and its end.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{Pid, PidfdFlags, Signal, WaitOptions, pidfd_open, pidfd_send_signal, waitpid},
};

use crate::cgroup::CgroupDir;

/// What the names of these cgroups begin with. They are no containers.
const PREFIX: &str = "intercept-";

/// A cgroup below the pod's, which cannot take a process itself if it has children with controllers. Removed on drop.
pub(crate) struct LeafCgroup {
    path: PathBuf,
    procs: File,
}

impl LeafCgroup {
    /// Creates it, or takes one that an agent left behind when it was killed.
    pub(crate) fn below(pod: &CgroupDir, name: &str) -> io::Result<Self> {
        let path = pod.path().join(format!("{PREFIX}{name}"));
        match fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        match OpenOptions::new().write(true).open(path.join("cgroup.procs")) {
            Ok(procs) => Ok(Self { path, procs }),
            Err(error) => {
                _ = fs::remove_dir(&path);
                Err(error)
            }
        }
    }

    /// Whether a cgroup is one of these, by its name.
    pub(crate) fn is_one(name: &str) -> bool {
        name.starts_with(PREFIX)
    }

    /// The file that moves a process into it.
    pub(crate) fn procs(&self) -> BorrowedFd<'_> {
        self.procs.as_fd()
    }
}

impl Drop for LeafCgroup {
    fn drop(&mut self) {
        match fs::remove_dir(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(cgroup = %self.path.display(), %error, "removing the cgroup of the child process");
            }
            _ => {}
        }
    }
}

/// The child process, which is killed and reaped on drop.
pub(crate) struct PodProcess(pub(crate) Pid);

impl Drop for PodProcess {
    fn drop(&mut self) {
        // Not reaped yet, so the pid has not been reused.
        if let Ok(process) = pidfd_open(self.0, PidfdFlags::empty()) {
            _ = pidfd_send_signal(process, Signal::KILL);
        }
        while matches!(waitpid(Some(self.0), WaitOptions::empty()), Err(Errno::INTR)) {}
    }
}

/// Receives the report of a child, which writes once or not at all. Empty if it died, or did not report in time.
pub(crate) fn receive(reader: OwnedFd, patience: Duration) -> io::Result<Vec<u8>> {
    let patience = Timespec::try_from(patience).map_err(io::Error::other)?;
    let ready = loop {
        match poll(&mut [PollFd::new(&reader, PollFlags::IN)], Some(&patience)) {
            Err(Errno::INTR) => {}
            ready => break ready?,
        }
    };
    let mut report = vec![0; 64];
    let read = if ready > 0 { File::from(reader).read(&mut report)? } else { 0 };
    report.truncate(read);
    Ok(report)
}
