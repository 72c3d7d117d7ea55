//! Taking descriptors of listening sockets from the processes that have them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::SocketAddr,
    ops::{ControlFlow, Range},
    time::{Duration, Instant},
};

use rustix::{
    io::Errno,
    net::AddressFamily,
    process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open},
};

use super::{FoundListeners, Listener, Missed};
use intercept_common::Family;

use crate::{netns::Netns, store::is_short};

/// How many descriptors of a process are looked at before those of the next.
const FEW: usize = 128;
pub(super) const TOO_MANY: &str = "the processes have more descriptors than are looked through in 20 ms";

/// Takes `wanted` (inode and address) from the processes of `first`, then from all others in the namespace.
pub(super) fn take(netns: &Netns, first: Vec<Pid>, wanted: BTreeMap<u64, SocketAddr>) -> FoundListeners {
    let others = std::iter::once_with(|| everyone().into_iter().filter(|&pid| netns.holds(pid))).flatten();
    walk(first.into_iter().chain(others), wanted, Walk::TIME).end()
}

/// Takes `wanted` from these processes. What they do not have is not missed, unless there was no time to look for it, or the
/// kernel lacked something for that.
pub(super) fn take_from(processes: Vec<Pid>, wanted: BTreeMap<u64, SocketAddr>) -> FoundListeners {
    let walk = walk(processes.into_iter(), wanted, Walk::LONG_TIME);
    let is_complete = !walk.is_over() && walk.lacking.is_none();
    if is_complete { FoundListeners { missed: Vec::new(), ..walk.end() } } else { walk.end() }
}

fn walk(processes: impl Iterator<Item = Pid>, wanted: BTreeMap<u64, SocketAddr>, time: Duration) -> Walk {
    let mut seen = BTreeSet::new();
    let mut walk = Walk::start(wanted, time);
    let mut long = Vec::new();
    for pid in processes {
        if walk.is_done() {
            break;
        }
        if seen.insert(pid.as_raw_nonzero()) && walk.take(pid, 0..FEW).is_break() {
            long.push(pid);
        }
    }
    // What listens was mostly opened early: processes with many descriptors come last with the rest of theirs.
    for pid in long {
        if !walk.is_done() {
            _ = walk.take(pid, FEW..usize::MAX);
        }
    }
    walk
}

/// Looking through descriptors, of which a pod may have millions.
struct Walk {
    left: u32,
    until: Instant,
    /// Sockets that are not found yet.
    wanted: BTreeMap<u64, SocketAddr>,
    /// Why a socket that was found could not be taken.
    causes: BTreeMap<u64, io::Error>,
    /// What the kernel lacked for looking at a process.
    lacking: Option<Errno>,
    listeners: Vec<Listener>,
}

impl Walk {
    /// However slow the machine is, so many are looked at.
    const LEAST: u32 = 4096;
    const TIME: Duration = Duration::from_millis(20);
    /// For those of a machine's applications, which an attach by an administrator waits for.
    const LONG_TIME: Duration = Duration::from_secs(3);

    fn start(wanted: BTreeMap<u64, SocketAddr>, time: Duration) -> Self {
        let until = Instant::now() + time;
        Self {
            left: Self::LEAST,
            until,
            wanted,
            causes: BTreeMap::new(),
            lacking: None,
            listeners: Vec::new(),
        }
    }

    fn is_over(&self) -> bool {
        self.left == 0 && Instant::now() >= self.until
    }

    fn is_done(&self) -> bool {
        self.wanted.is_empty() || self.is_over()
    }

    /// Takes those of the wanted sockets that the process has among these of its descriptors. Breaks where it has more.
    fn take(&mut self, pid: Pid, range: Range<usize>) -> ControlFlow<()> {
        let entries = match fs::read_dir(format!("/proc/{pid}/fd")) {
            Ok(entries) => entries,
            Err(error) => {
                // A process that is gone, or that may not be looked at, has nothing for us.
                self.note_lack(&error);
                return ControlFlow::Continue(());
            }
        };
        for (number, entry) in entries.flatten().enumerate().skip(range.start) {
            if number >= range.end || self.is_over() {
                return ControlFlow::Break(());
            }
            self.left = self.left.saturating_sub(1);
            let Some(number) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            let link = fs::read_link(entry.path()).map_err(|error| self.note_lack(&error));
            let Some(inode) = link.ok().and_then(|link| socket_inode(link.to_str()?)) else { continue };
            let Some(&address) = self.wanted.get(&inode) else { continue };
            match duplicate(pid, number, inode, address) {
                Ok(Some(listener)) => {
                    self.wanted.remove(&inode);
                    self.listeners.push(listener);
                }
                // Closed or replaced meanwhile.
                Ok(None) => {}
                Err(error) => _ = self.causes.insert(inode, error),
            }
        }
        ControlFlow::Continue(())
    }

    fn note_lack(&mut self, error: &io::Error) {
        self.lacking = Errno::from_io_error(error).filter(|_| is_short(error)).or(self.lacking);
    }

    fn end(mut self) -> FoundListeners {
        let gave_up = self.is_over();
        let missed = |(inode, address)| {
            let too_many = || io::Error::new(io::ErrorKind::TimedOut, TOO_MANY);
            let lacking = || self.lacking.map(io::Error::from);
            let cause = self.causes.remove(&inode).or_else(lacking).or_else(|| gave_up.then(too_many));
            Missed { address, cause }
        };
        FoundListeners { missed: self.wanted.into_iter().map(missed).collect(), listeners: self.listeners }
    }
}

fn duplicate(pid: Pid, number: i32, inode: u64, address: SocketAddr) -> io::Result<Option<Listener>> {
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    let fd = pidfd_getfd(&process, number, PidfdGetfdFlags::empty())?;
    if rustix::fs::fstat(&fd)?.st_ino != inode {
        return Ok(None);
    }
    let is_v6 = rustix::net::sockopt::socket_domain(&fd)? == AddressFamily::INET6;
    let family = if is_v6 { Family::V6 } else { Family::V4 };
    Ok(Some(Listener { family, addr: address.ip(), port: address.port(), inode, pid, fd }))
}

/// The inodes of all sockets of processes with this name.
pub(super) fn sockets_of(process: &str) -> BTreeSet<u64> {
    let has_name = |pid: &Pid| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        name.trim_end() == process
    };
    let descriptors = |pid: Pid| fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let named = everyone().into_iter().filter(has_name).flat_map(descriptors);
    named.filter_map(|entry| socket_inode(fs::read_link(entry.path()).ok()?.to_str()?)).collect()
}

/// The inode in `socket:[INODE]`.
fn socket_inode(link: &str) -> Option<u64> {
    link.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// All processes that can be seen.
fn everyone() -> Vec<Pid> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok().and_then(Pid::from_raw)).collect()
}
