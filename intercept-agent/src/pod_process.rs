//! A short-lived child process inside a pod: its cgroup, its descriptors, its report, and its end.

use std::{
    fs::{self, File},
    io::{self, Read as _},
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{FlockOperation, Mode, OFlags, flock, openat},
    io::Errno,
    process::{Pid, PidfdFlags, Signal, WaitOptions, pidfd_open, pidfd_send_signal, waitpid},
};

use crate::{cgroup::CgroupDir, ownership::is_at};

/// What the names of these cgroups begin with. They are no containers.
const PREFIX: &str = "intercept-";
/// How long the lock of its folder is tried.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);
const LOCK_PAUSE: Duration = Duration::from_millis(2);

/// A cgroup below the pod's, which cannot take a process itself if it has children with controllers. The last agent that uses it
/// removes it on drop.
pub(crate) struct LeafCgroup {
    path: PathBuf,
    /// Its folder, with a shared lock.
    dir: File,
    procs: File,
}

impl LeafCgroup {
    /// Creates it, or takes one that another agent uses, or left behind when it was killed.
    pub(crate) fn below(pod: &CgroupDir, name: &str) -> io::Result<Self> {
        let path = pod.path().join(format!("{PREFIX}{name}"));
        let deadline = Instant::now() + LOCK_PATIENCE;
        loop {
            match fs::create_dir(&path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
            let dir = match File::open(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                dir => dir?,
            };
            // Another agent that removes it has it for a moment. A process of the pod may have it for as long as it likes.
            match flock(&dir, FlockOperation::NonBlockingLockShared) {
                Err(Errno::WOULDBLOCK) if Instant::now() < deadline => {
                    thread::sleep(LOCK_PAUSE);
                    continue;
                }
                locked => locked?,
            }
            if !is_at(&dir, &path) {
                continue;
            }
            let procs = openat(&dir, "cgroup.procs", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
            return match procs {
                Ok(procs) => Ok(Self { path, dir, procs: procs.into() }),
                Err(error) => {
                    remove(&path, &dir);
                    Err(error.into())
                }
            };
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
        remove(&self.path, &self.dir);
    }
}

/// Removes the cgroup, unless another agent has locked its folder, which will.
fn remove(path: &Path, dir: &File) {
    let removed = match flock(dir, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => return,
        Err(error) => Err(error.into()),
        Ok(()) => fs::remove_dir(path),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(cgroup = %path.display(), %error, "removing the cgroup of the child process");
        }
        _ => {}
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

/// Closes all descriptors but these, in a child. It has copies of all that its parent has open, also of what other threads are
/// using: the end of a pipe that another child waits on, or a lock. Neither allocates nor locks.
pub(crate) fn close_others<const N: usize>(mut kept: [BorrowedFd<'_>; N]) -> Result<(), Errno> {
    kept.sort_unstable_by_key(|fd| fd.as_raw_fd());
    let mut next: RawFd = 0;
    for fd in kept {
        close_range(next, fd.as_raw_fd() - 1)?;
        next = fd.as_raw_fd() + 1;
    }
    close_range(next, RawFd::MAX)
}

fn close_range(first: RawFd, last: RawFd) -> Result<(), Errno> {
    if last < first {
        return Ok(());
    }
    // SAFETY: nothing in the child uses these descriptors, and it runs no destructor that would close them.
    match unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } {
        0 => Ok(()),
        _ => Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::BADF)),
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

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;
    use crate::testing::TestCgroup;

    #[test]
    fn the_last_agent_that_uses_a_cgroup_removes_it() {
        let test = TestCgroup::new();
        let path = test.cgroup.path().join("intercept-proof");
        let leaf = || LeafCgroup::below(&test.cgroup, "proof").expect("a cgroup");
        let (one, other) = (leaf(), leaf());
        drop(one);
        assert!(path.exists(), "the other still needs it");
        drop(leaf());
        assert!(path.exists(), "the other still needs it");
        drop(other);
        assert!(!path.exists());
        // An agent that was killed has left it.
        fs::create_dir(&path).expect("a cgroup");
        drop(leaf());
        assert!(!path.exists());
    }

    #[test]
    fn agents_that_use_a_cgroup_at_the_same_time_do_not_remove_it_from_each_other() {
        const AGENTS: usize = 4;
        let test = TestCgroup::new();
        let path = test.cgroup.path().join("intercept-proof");
        let together = Barrier::new(AGENTS);
        thread::scope(|scope| {
            for _ in 0..AGENTS {
                scope.spawn(|| {
                    together.wait();
                    for _ in 0..500 {
                        let _leaf = LeafCgroup::below(&test.cgroup, "proof").expect("a cgroup");
                        assert!(path.exists());
                    }
                });
            }
        });
        assert!(!path.exists());
    }
}
