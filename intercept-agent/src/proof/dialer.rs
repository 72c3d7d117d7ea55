//! The child process that makes the connections. Its parent may have other threads, so after the fork it only makes system
//! calls: it neither allocates nor takes locks.

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use intercept_common::decide::Owner;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{Mode, OFlags, fstat},
    io::Errno,
    net::{
        AddressFamily, SocketFlags, SocketType, connect, getsockname, ipproto, socket_with,
        sockopt::socket_error,
    },
    pipe::{PipeFlags, pipe_with},
    process::{DumpableBehavior, Gid, Pid, Uid, set_dumpable_behavior},
    thread::{
        LinkNameSpaceType, move_into_link_name_space, set_no_new_privs, set_thread_groups,
        set_thread_res_gid, set_thread_res_uid,
    },
};

use super::{ProbeDialled, ProofError};
use crate::{
    cgroup::CgroupDir,
    netns::Netns,
    pod_process::{LeafCgroup, PodProcess, close_others, receive},
};

/// Time for the child to start and to report.
const MARGIN: Duration = Duration::from_secs(2);
/// Destinations of one child, one of a family.
const TARGETS: usize = 2;

type Targets = [Option<SocketAddr>; TARGETS];

/// The child, which holds its connections until it is dropped.
pub(super) struct Dialer {
    /// By the index of the target.
    pub(super) outcomes: [Option<ProbeDialled>; TARGETS],
    _hold: OwnedFd,
    // Dropped in this order: the cgroup can be removed when the child is gone.
    _child: PodProcess,
    _leaf: LeafCgroup,
}

impl Dialer {
    /// Starts a child in the pod, as `owner`, and waits until its connections are made, have failed or `timeout` has passed.
    pub(super) fn dial(
        netns: &Netns,
        cgroup: &CgroupDir,
        owner: Owner,
        targets: Targets,
        timeout: Duration,
    ) -> Result<Self, ProofError> {
        let setup = |step| move |source: io::Error| ProofError::Setup { step, source };
        let leaf = LeafCgroup::below(cgroup, "proof").map_err(setup("creating a cgroup below the pod's"))?;
        let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(|error| setup("creating a pipe")(error.into()));
        let (reader, report) = pipe()?;
        let (held, hold) = pipe()?;
        let job = ProbeJob {
            procs: leaf.procs(),
            netns: netns.as_fd(),
            report: report.as_fd(),
            held: held.as_fd(),
            owner,
            targets,
            deadline: Instant::now() + timeout,
        };
        let child = start(&job).map_err(|error| setup("starting a process")(error.into()))?;
        let child = PodProcess(child);
        drop((report, held));
        let report = receive(reader, timeout + MARGIN).map_err(setup("waiting for the child process"))?;
        let report = ProbeReport::decode(&report).ok_or(ProofError::Silent)?;
        let outcomes = report.map_err(|(step, error)| setup(step.text())(error.into()))?;
        Ok(Self { outcomes, _hold: hold, _child: child, _leaf: leaf })
    }
}

/// What the child is given.
struct ProbeJob<'a> {
    procs: BorrowedFd<'a>,
    netns: BorrowedFd<'a>,
    report: BorrowedFd<'a>,
    /// Readable when the parent is done.
    held: BorrowedFd<'a>,
    owner: Owner,
    targets: Targets,
    deadline: Instant,
}

/// A step before the connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SetupStep {
    Descriptors = 0,
    Netns = 1,
    Memory = 2,
    Cgroup = 3,
    User = 4,
    Socket = 5,
}

impl SetupStep {
    const ALL: [Self; 6] =
        [Self::Descriptors, Self::Netns, Self::Memory, Self::Cgroup, Self::User, Self::Socket];

    fn text(self) -> &'static str {
        match self {
            Self::Descriptors => "closing descriptors",
            Self::Netns => "entering the pod's network namespace",
            Self::Memory => "offering the process to the out-of-memory killer",
            Self::Cgroup => "joining a cgroup below the pod's",
            Self::User => "giving up privileges",
            Self::Socket => "creating a socket",
        }
    }
}

/// Forks the child, which reports, holds its connections and exits.
fn start(job: &ProbeJob<'_>) -> Result<Pid, Errno> {
    // SAFETY: the child has one thread and runs only `child`, which makes system calls on its arguments and its own
    // stack. It takes no lock, does not allocate and does not panic. Then it exits without running destructors or exit
    // handlers of the parent.
    match unsafe { libc::fork() } {
        -1 => Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::AGAIN)),
        0 => {
            child(job);
            // SAFETY: ends the process at once. It has nothing to clean up.
            unsafe { libc::_exit(0) }
        }
        pid => Pid::from_raw(pid).ok_or(Errno::AGAIN),
    }
}

fn child(job: &ProbeJob<'_>) {
    let mut sockets = [const { None }; TARGETS];
    let report = match enter(job) {
        Ok(()) => dial(job, &mut sockets),
        Err(failed) => Err(failed),
    };
    _ = rustix::io::write(job.report, &ProbeReport::encode(report));
    // The parent looks at the connections now. It closes the other end when it is done, or when it dies.
    let left = job.deadline.saturating_duration_since(Instant::now()) + MARGIN;
    _ = poll(&mut [PollFd::from_borrowed_fd(job.held, PollFlags::IN)], Some(&timespec(left)));
}

/// Enters the pod with nothing of the agent's but the four descriptors. The namespace comes first: a process of the cgroup
/// says where the pod's namespace is. A socket belongs to the user and the cgroup of the process that creates it.
fn enter(job: &ProbeJob<'_>) -> Result<(), (SetupStep, Errno)> {
    let at = |step| move |error: Errno| (step, error);
    close_others([job.procs, job.netns, job.report, job.held]).map_err(at(SetupStep::Descriptors))?;
    move_into_link_name_space(job.netns, Some(LinkNameSpaceType::Network)).map_err(at(SetupStep::Netns))?;
    // Where the pod has no memory left, this process is killed and not the application.
    let open = OFlags::WRONLY | OFlags::CLOEXEC;
    rustix::fs::open(c"/proc/self/oom_score_adj", open, Mode::empty())
        .and_then(|file| rustix::io::write(&file, b"1000"))
        .map_err(at(SetupStep::Memory))?;
    rustix::io::write(job.procs, b"0").map_err(at(SetupStep::Cgroup))?;
    let (uid, gid) = (Uid::from_raw(job.owner.uid), Gid::from_raw(job.owner.gid));
    set_thread_groups(&[])
        .and_then(|()| set_thread_res_gid(gid, gid, gid))
        .and_then(|()| set_thread_res_uid(uid, uid, uid))
        .and_then(|()| set_no_new_privs(true))
        // A process of the same user cannot read its memory, which is a copy of the agent's.
        .and_then(|()| set_dumpable_behavior(DumpableBehavior::NotDumpable))
        .map_err(at(SetupStep::User))
}

fn dial(
    job: &ProbeJob<'_>,
    sockets: &mut [Option<OwnedFd>; TARGETS],
) -> Result<Outcomes, (SetupStep, Errno)> {
    let mut outcomes: Outcomes = [None; TARGETS];
    for ((target, socket), outcome) in job.targets.iter().zip(sockets.iter_mut()).zip(&mut outcomes) {
        let Some(target) = target else { continue };
        let opened = open(target).map_err(|error| (SetupStep::Socket, error))?;
        match connect(&opened, target) {
            Ok(()) | Err(Errno::INPROGRESS) => {
                let named = named(&opened).map_err(|error| (SetupStep::Socket, error))?;
                *outcome = Some(ProbeDialled::Pending { port: named.0, inode: named.1 });
            }
            Err(error) => *outcome = Some(ProbeDialled::Failed(error)),
        }
        *socket = Some(opened);
    }
    loop {
        let mut pending = false;
        for (socket, outcome) in sockets.iter().zip(&mut outcomes) {
            let (Some(socket), Some(ProbeDialled::Pending { port, inode })) = (socket, *outcome) else {
                continue;
            };
            let mut waiting = [PollFd::new(socket, PollFlags::OUT)];
            let ready = poll(&mut waiting, Some(&timespec(Duration::ZERO)));
            if !matches!(ready, Ok(1)) {
                pending = true;
                continue;
            }
            *outcome = Some(match socket_error(socket) {
                Ok(Ok(())) => ProbeDialled::Connected { port, inode },
                Ok(Err(error)) | Err(error) => ProbeDialled::Failed(error),
            });
        }
        let left = job.deadline.saturating_duration_since(Instant::now());
        if !pending || left.is_zero() {
            return Ok(outcomes);
        }
        wait(sockets, &outcomes, left);
    }
}

/// Waits until a pending connection may have changed.
fn wait(sockets: &[Option<OwnedFd>; TARGETS], outcomes: &Outcomes, left: Duration) {
    let pending = |index: usize| match (&sockets[index], &outcomes[index]) {
        (Some(socket), Some(ProbeDialled::Pending { .. })) => Some(socket),
        _ => None,
    };
    match (pending(0), pending(1)) {
        (Some(one), Some(other)) => {
            let mut both = [PollFd::new(one, PollFlags::OUT), PollFd::new(other, PollFlags::OUT)];
            _ = poll(&mut both, Some(&timespec(left)));
        }
        (Some(one), None) | (None, Some(one)) => {
            _ = poll(&mut [PollFd::new(one, PollFlags::OUT)], Some(&timespec(left)));
        }
        (None, None) => {}
    }
}

fn open(target: &SocketAddr) -> Result<OwnedFd, Errno> {
    let family = if target.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, Some(ipproto::TCP))
}

/// The local port and the inode of a socket.
fn named(socket: &OwnedFd) -> Result<(u16, u64), Errno> {
    let name = SocketAddr::try_from(getsockname(socket)?).map_err(|_| Errno::AFNOSUPPORT)?;
    Ok((name.port(), fstat(socket)?.st_ino))
}

type Outcomes = [Option<ProbeDialled>; TARGETS];

/// What the child reports: the step that failed, or the outcomes.
struct ProbeReport;

impl ProbeReport {
    /// Of an outcome: kind, port, error, inode.
    const PART: usize = 16;
    const SIZE: usize = TARGETS * Self::PART;

    fn encode(report: Result<Outcomes, (SetupStep, Errno)>) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        let part = |kind: u16, port: u16, error: i32, inode: u64| {
            let mut part = [0; Self::PART];
            part[..2].copy_from_slice(&kind.to_ne_bytes());
            part[2..4].copy_from_slice(&port.to_ne_bytes());
            part[4..8].copy_from_slice(&error.to_ne_bytes());
            part[8..].copy_from_slice(&inode.to_ne_bytes());
            part
        };
        match report {
            Err((step, error)) => {
                bytes[..Self::PART].copy_from_slice(&part(4, step as u16, error.raw_os_error(), 0));
            }
            Ok(outcomes) => {
                for (bytes, outcome) in bytes.chunks_exact_mut(Self::PART).zip(outcomes) {
                    bytes.copy_from_slice(&match outcome {
                        None => part(0, 0, 0, 0),
                        Some(ProbeDialled::Connected { port, inode }) => part(1, port, 0, inode),
                        Some(ProbeDialled::Pending { port, inode }) => part(2, port, 0, inode),
                        Some(ProbeDialled::Failed(error)) => part(3, 0, error.raw_os_error(), 0),
                    });
                }
            }
        }
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Result<Outcomes, (SetupStep, Errno)>> {
        if bytes.len() != Self::SIZE {
            return None;
        }
        let mut outcomes: Outcomes = [None; TARGETS];
        for (part, outcome) in bytes.chunks_exact(Self::PART).zip(&mut outcomes) {
            let (kind, rest) = part.split_first_chunk::<2>()?;
            let (port, rest) = rest.split_first_chunk::<2>()?;
            let (error, rest) = rest.split_first_chunk::<4>()?;
            let (port, number) = (u16::from_ne_bytes(*port), i32::from_ne_bytes(*error));
            let inode = u64::from_ne_bytes(*rest.first_chunk::<8>()?);
            let error = || (1..4096).contains(&number).then(|| Errno::from_raw_os_error(number));
            *outcome = match u16::from_ne_bytes(*kind) {
                0 => None,
                1 => Some(ProbeDialled::Connected { port, inode }),
                2 => Some(ProbeDialled::Pending { port, inode }),
                3 => Some(ProbeDialled::Failed(error()?)),
                4 => return Some(Err((*SetupStep::ALL.get(usize::from(port))?, error()?))),
                _ => return None,
            };
        }
        Some(Ok(outcomes))
    }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec { tv_sec: duration.as_secs().cast_signed(), tv_nsec: duration.subsec_nanos().into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_survive_the_pipe() {
        let connected = ProbeDialled::Connected { port: 40_000, inode: u64::MAX };
        let pending = ProbeDialled::Pending { port: 1, inode: 7 };
        let failed = ProbeDialled::Failed(Errno::CONNREFUSED);
        for report in [
            Ok([None, None]),
            Ok([Some(connected), Some(pending)]),
            Ok([Some(failed), None]),
            Err((SetupStep::Cgroup, Errno::AGAIN)),
        ] {
            assert_eq!(ProbeReport::decode(&ProbeReport::encode(report)), Some(report));
        }
        assert_eq!(ProbeReport::decode(&[]), None, "it died");
    }
}
