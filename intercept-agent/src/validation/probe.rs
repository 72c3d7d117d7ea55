//! The child process. Its parent may have other threads, so after the fork it only makes system calls: it neither
//! allocates nor takes locks.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{
    ip_original_dst, ipv6_original_dst, set_ipv6_v6only, set_socket_reuseaddr, socket_error,
};
use rustix::net::{
    AddressFamily, SocketFlags, SocketType, accept_with, bind, connect, ipproto, listen, socket_with,
};
use rustix::process::{Gid, Pid, Uid};
use rustix::thread::{
    LinkNameSpaceType, move_into_link_name_space, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

use super::{ListenerFate, Probe};

/// Pause between two attempts. Programs that are just being attached may become active at any time.
const PAUSE: Duration = Duration::from_millis(100);
/// Upper limit of the timeout.
pub(super) const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// One of the two connections of the check.
#[derive(Clone, Copy)]
pub(super) enum ProbeLeg {
    V4 = 0,
    V6 = 1,
}

impl ProbeLeg {
    pub(super) const BOTH: [Self; 2] = [Self::V4, Self::V6];

    /// Returns the source address, which is also the address that the proxy would listen on.
    pub(super) fn source(self) -> IpAddr {
        match self {
            Self::V4 => IpAddr::V4(Ipv4Addr::LOCALHOST),
            Self::V6 => IpAddr::V6(Ipv6Addr::LOCALHOST),
        }
    }

    /// Returns the destination. `::6` is added to the loopback interface when interception is set up.
    pub(super) fn destination(self) -> IpAddr {
        match self {
            Self::V4 => IpAddr::V4(Ipv4Addr::new(127, 0, 0, 6)),
            Self::V6 => IpAddr::V6(Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6)),
        }
    }

    /// Returns the original destination of an accepted connection (SO_ORIGINAL_DST).
    fn original(self, accepted: &OwnedFd) -> Result<SocketAddr, Errno> {
        match self {
            Self::V4 => ip_original_dst(accepted).map(SocketAddr::V4),
            Self::V6 => ipv6_original_dst(accepted).map(SocketAddr::V6),
        }
    }
}

/// The outcome of one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ProbeOutcome {
    /// It arrived as required, at this port.
    Passed(u16),
    /// The namespace lacks the addresses.
    Absent,
    /// It did not arrive as required.
    Failed(ListenerFate),
    /// Neither port can be listened on.
    Listen(Errno),
    /// The process cannot be set up.
    Setup(ProbeStep, Errno),
}

/// A step before the check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ProbeStep {
    Cgroup = 0,
    Netns = 1,
    User = 2,
    Socket = 3,
}

impl ProbeStep {
    const ALL: [Self; 4] = [Self::Cgroup, Self::Netns, Self::User, Self::Socket];

    pub(super) fn text(self) -> &'static str {
        match self {
            Self::Cgroup => "joining a cgroup below the pod's",
            Self::Netns => "entering the pod's network namespace",
            Self::User => "switching to the proxy's user",
            Self::Socket => "creating a socket",
        }
    }
}

impl ProbeOutcome {
    /// Length of an encoded outcome in bytes: kind, port, second port or step, error.
    pub(super) const SIZE: usize = 12;

    pub(super) fn encode(self) -> [u8; Self::SIZE] {
        let error = |error: Errno| error.raw_os_error();
        let (what, one, other, error) = match self {
            Self::Passed(at) => (0_u32, at, 0, 0),
            Self::Absent => (1, 0, 0, 0),
            Self::Failed(ListenerFate::Refused(why)) => (2, 0, 0, error(why)),
            Self::Failed(ListenerFate::Elsewhere) => (3, 0, 0, 0),
            Self::Failed(ListenerFate::Nothing) => (4, 0, 0, 0),
            Self::Failed(ListenerFate::NoOriginal(at, why)) => (5, at, 0, error(why)),
            Self::Failed(ListenerFate::OtherPort(at, original)) => (6, at, original, 0),
            Self::Listen(why) => (7, 0, 0, error(why)),
            Self::Setup(step, why) => (8, 0, step as u16, error(why)),
        };
        let mut bytes = [0; Self::SIZE];
        bytes[..4].copy_from_slice(&what.to_ne_bytes());
        bytes[4..6].copy_from_slice(&one.to_ne_bytes());
        bytes[6..8].copy_from_slice(&other.to_ne_bytes());
        bytes[8..].copy_from_slice(&error.to_ne_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let (what, rest) = bytes.split_first_chunk::<4>()?;
        let (one, rest) = rest.split_first_chunk::<2>()?;
        let (other, rest) = rest.split_first_chunk::<2>()?;
        let number = i32::from_ne_bytes(*rest.first_chunk::<4>()?);
        let error = || (1..4096).contains(&number).then(|| Errno::from_raw_os_error(number));
        let (one, other) = (u16::from_ne_bytes(*one), u16::from_ne_bytes(*other));
        Some(match u32::from_ne_bytes(*what) {
            0 => Self::Passed(one),
            1 => Self::Absent,
            2 => Self::Failed(ListenerFate::Refused(error()?)),
            3 => Self::Failed(ListenerFate::Elsewhere),
            4 => Self::Failed(ListenerFate::Nothing),
            5 => Self::Failed(ListenerFate::NoOriginal(one, error()?)),
            6 => Self::Failed(ListenerFate::OtherPort(one, other)),
            7 => Self::Listen(error()?),
            8 => Self::Setup(*ProbeStep::ALL.get(usize::from(other))?, error()?),
            _ => return None,
        })
    }
}

/// Forks the child. It writes the outcomes of both connections to `report` and exits.
pub(super) fn start(
    procs: BorrowedFd<'_>,
    netns: BorrowedFd<'_>,
    report: BorrowedFd<'_>,
    probe: &Probe,
) -> Result<Pid, Errno> {
    let deadline = Instant::now() + probe.timeout.min(LONGEST);
    // SAFETY: the child has one thread and runs only `child`, which makes system calls on its arguments and its own
    // stack. It takes no lock, does not allocate and does not panic. Then it exits without running destructors or exit
    // handlers of the parent.
    match unsafe { libc::fork() } {
        -1 => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::AGAIN)),
        0 => {
            let outcomes = child(procs, netns, probe, deadline);
            let mut bytes = [0; 2 * ProbeOutcome::SIZE];
            let (v4, v6) = bytes.split_at_mut(ProbeOutcome::SIZE);
            v4.copy_from_slice(&outcomes[0].encode());
            v6.copy_from_slice(&outcomes[1].encode());
            _ = rustix::io::write(report, &bytes);
            // SAFETY: ends the process at once. It has nothing to clean up.
            unsafe { libc::_exit(0) }
        }
        pid => Pid::from_raw(pid).ok_or(Errno::AGAIN),
    }
}

fn child(
    procs: BorrowedFd<'_>,
    netns: BorrowedFd<'_>,
    probe: &Probe,
    deadline: Instant,
) -> [ProbeOutcome; 2] {
    if let Err((step, error)) = become_proxy(procs, netns, probe) {
        return [ProbeOutcome::Setup(step, error); 2];
    }
    let v4 = attempt(ProbeLeg::V4, probe, deadline);
    match v4 {
        // This outcome is written first, because the second connection may use up the remaining time.
        ProbeOutcome::Passed(_) => [v4, attempt(ProbeLeg::V6, probe, deadline)],
        _ => [v4; 2],
    }
}

/// Joins the cgroup and the namespace and switches to the proxy's user. A socket belongs to the user and the cgroup of
/// the process that creates it.
fn become_proxy(
    procs: BorrowedFd<'_>,
    netns: BorrowedFd<'_>,
    probe: &Probe,
) -> Result<(), (ProbeStep, Errno)> {
    rustix::io::write(procs, b"0").map_err(|error| (ProbeStep::Cgroup, error))?;
    move_into_link_name_space(netns, Some(LinkNameSpaceType::Network))
        .map_err(|error| (ProbeStep::Netns, error))?;
    let (uid, gid) = (Uid::from_raw(probe.uid), Gid::from_raw(probe.gid));
    let user = |error| (ProbeStep::User, error);
    set_thread_groups(&[]).map_err(user)?;
    set_thread_res_gid(gid, gid, gid).map_err(user)?;
    set_thread_res_uid(uid, uid, uid).map_err(user)
}

fn attempt(leg: ProbeLeg, probe: &Probe, deadline: Instant) -> ProbeOutcome {
    let failed = |error| ProbeOutcome::Setup(ProbeStep::Socket, error);
    if let ProbeLeg::V6 = leg {
        for address in [leg.source(), leg.destination()] {
            match socket(leg).and_then(|socket| bind(&socket, &SocketAddr::new(address, 0))) {
                Ok(()) => {}
                Err(Errno::ADDRNOTAVAIL | Errno::AFNOSUPPORT) => return ProbeOutcome::Absent,
                Err(error) => return failed(error),
            }
        }
    }
    let ports = [probe.proxy_port, probe.inbound_port];
    let listeners = ports.map(|port| listener(leg, port));
    if let [Err(_), Err(error)] = listeners {
        return ProbeOutcome::Listen(error);
    }
    let mut seen = ListenerFate::Nothing;
    loop {
        match connection(leg, probe, &listeners, deadline) {
            Ok(Ok(index)) => return ProbeOutcome::Passed(ports[index]),
            // An attempt that timed out says less than an earlier one that failed.
            Ok(Err(ListenerFate::Nothing)) => {}
            Ok(Err(what)) => seen = what,
            Err(error) => return failed(error),
        }
        let left = deadline.saturating_duration_since(Instant::now());
        _ = poll(&mut [], Some(&timespec(left.min(PAUSE))));
        if left <= PAUSE {
            return ProbeOutcome::Failed(seen);
        }
    }
}

/// Opens one connection. Returns the index of the port where it arrived, or what happened instead.
fn connection(
    leg: ProbeLeg,
    probe: &Probe,
    listeners: &[Result<OwnedFd, Errno>; 2],
    deadline: Instant,
) -> Result<Result<usize, ListenerFate>, Errno> {
    let ports = [probe.proxy_port, probe.inbound_port];
    let client = socket(leg)?;
    bind(&client, &SocketAddr::new(leg.source(), 0))?;
    match connect(&client, &SocketAddr::new(leg.destination(), probe.probe_port)) {
        Ok(()) | Err(Errno::INPROGRESS) => {}
        Err(error) => return Ok(Err(ListenerFate::Refused(error))),
    }
    let mut made = false;
    loop {
        for (index, listener) in listeners.iter().enumerate() {
            let Ok(listener) = listener else { continue };
            let Ok(accepted) = accept_with(listener, SocketFlags::CLOEXEC) else { continue };
            return Ok(match leg.original(&accepted) {
                Ok(original) if original.port() == probe.probe_port => Ok(index),
                Ok(original) => Err(ListenerFate::OtherPort(ports[index], original.port())),
                Err(error) => Err(ListenerFate::NoOriginal(ports[index], error)),
            });
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || made {
            return Ok(Err(if made { ListenerFate::Elsewhere } else { ListenerFate::Nothing }));
        }
        // The client, which is polled anyway, takes the place of a missing listener.
        let fd = |index: usize| listeners[index].as_ref().map_or(client.as_fd(), AsFd::as_fd);
        let interest = |index: usize| if listeners[index].is_ok() { PollFlags::IN } else { PollFlags::OUT };
        let mut waiting = [
            PollFd::from_borrowed_fd(client.as_fd(), PollFlags::OUT),
            PollFd::from_borrowed_fd(fd(0), interest(0)),
            PollFd::from_borrowed_fd(fd(1), interest(1)),
        ];
        match poll(&mut waiting, Some(&timespec(left))) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
        if !waiting[0].revents().is_empty() {
            if let Err(error) = socket_error(&client)? {
                return Ok(Err(ListenerFate::Refused(error)));
            }
            // On loopback an established connection is already in the listener's queue: check the listeners once more.
            made = true;
        }
    }
}

fn listener(leg: ProbeLeg, port: u16) -> Result<OwnedFd, Errno> {
    let socket = socket(leg)?;
    set_socket_reuseaddr(&socket, true)?;
    bind(&socket, &SocketAddr::new(leg.source(), port))?;
    listen(&socket, 16)?;
    Ok(socket)
}

fn socket(leg: ProbeLeg) -> Result<OwnedFd, Errno> {
    let family = match leg {
        ProbeLeg::V4 => AddressFamily::INET,
        ProbeLeg::V6 => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP))?;
    if let ProbeLeg::V6 = leg {
        set_ipv6_v6only(&socket, true)?;
    }
    Ok(socket)
}

fn timespec(duration: Duration) -> Timespec {
    Timespec { tv_sec: duration.as_secs().cast_signed(), tv_nsec: duration.subsec_nanos().into() }
}
