//! Sockets of the proxy that listened before the programs were attached, and so did not register themselves.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::{ControlFlow, Range};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use intercept_common::Addr;
use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST};
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};
use netlink_packet_sock_diag::{AF_INET, AF_INET6, IPPROTO_TCP, SockDiagMessage};
use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use procfs::ProcError;
use procfs::net::TcpState;
use procfs::process::Process;
use rustix::net::AddressFamily;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::cgroup::{CgroupDir, CgroupError};
use crate::netlink::Questions;
use crate::netns::{Netns, NetnsError};

/// A listening TCP socket, shared with the process that has it.
#[derive(Debug)]
pub struct Listener {
    /// 4 or 6: the family of the socket.
    pub family: u8,
    /// What it is bound to; unspecified for all addresses.
    pub addr: IpAddr,
    /// Host order.
    pub port: u16,
    /// Of family 6, and does not take IPv4.
    pub v6only: bool,
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
pub struct Found {
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

/// Finds what listens on `ports` in `netns`. The processes of `cgroup` are asked first, then all others that are in
/// the namespace.
pub fn find(netns: &Netns, cgroup: &CgroupDir, ports: &[u16]) -> Result<Found, ListenersError> {
    let mut wanted = listening(netns, ports)?;
    let mut found = Found::default();
    if wanted.is_empty() {
        return Ok(found);
    }
    let pods = match cgroup.processes() {
        Ok(pods) => pods,
        // Then nobody is found to have them, which is reported socket by socket.
        Err(CgroupError::Hidden { .. }) => Vec::new(),
        Err(error) => return Err(error.into()),
    };
    let mut causes = BTreeMap::new();
    let mut seen = BTreeSet::new();
    let others = std::iter::once_with(|| everyone().into_iter().filter(|&pid| netns.holds(pid))).flatten();
    let mut walk = Walk::start();
    let mut long = Vec::new();
    for pid in pods.into_iter().chain(others) {
        if wanted.is_empty() || walk.is_over() {
            break;
        }
        if seen.insert(pid.as_raw_nonzero())
            && take(pid, 0..FEW, &mut walk, &mut wanted, &mut found.listeners, &mut causes).is_break()
        {
            long.push(pid);
        }
    }
    // What listens was mostly opened early: processes with many descriptors come last with the rest of theirs.
    for pid in long {
        if !wanted.is_empty() && !walk.is_over() {
            _ = take(pid, FEW..usize::MAX, &mut walk, &mut wanted, &mut found.listeners, &mut causes);
        }
    }
    let gave_up = walk.is_over();
    let missed = |(inode, address)| {
        let too_many = || io::Error::new(io::ErrorKind::TimedOut, TOO_MANY);
        Missed { address, cause: causes.remove(&inode).or_else(|| gave_up.then(too_many)) }
    };
    found.missed = wanted.into_iter().map(missed).collect();
    Ok(found)
}

/// Inode and address of what listens on `ports` in `netns`.
fn listening(netns: &Netns, ports: &[u16]) -> Result<BTreeMap<u64, SocketAddr>, ListenersError> {
    let list = |source| ListenersError::List { netns: netns.name().to_owned(), source };
    let listed = match listed(netns)? {
        // Kernels without it are rare, and may load its module only on request.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EPROTONOSUPPORT)) => {
            netns.run(read).map_err(ListenersError::from)?.map_err(|error| list(io::Error::other(error)))?
        }
        listed => listed.map_err(list)?,
    };
    Ok(listed.into_iter().filter(|(_, address)| ports.contains(&address.port())).collect())
}

/// All that listens, from the kernel's table of listeners: /proc/net/tcp goes through the node's whole table of
/// connections, which takes a hundred times as long.
fn listed(netns: &Netns) -> Result<io::Result<Vec<(u64, SocketAddr)>>, NetnsError> {
    let ask = |mut questions: Questions| ask_for(&mut questions, 0);
    Ok(Questions::open(netns, NETLINK_SOCK_DIAG)?.and_then(ask))
}

/// What listens on a port; on any if that is 0.
fn ask_for(questions: &mut Questions, port: u16) -> io::Result<Vec<(u64, SocketAddr)>> {
    let mut found = Vec::new();
    for (family, mut socket_id) in [(AF_INET, SocketId::new_v4()), (AF_INET6, SocketId::new_v6())] {
        socket_id.source_port = port;
        let request = InetRequest {
            family,
            protocol: IPPROTO_TCP,
            extensions: ExtensionFlags::empty(),
            states: StateFlags::LISTEN,
            socket_id,
        };
        let request = SockDiagMessage::InetRequest(request);
        let (answers, _) = questions.ask(request, NLM_F_REQUEST | NLM_F_DUMP)?;
        found.extend(answers.into_iter().filter_map(|answer| {
            let SockDiagMessage::InetResponse(response) = answer else { return None };
            let (header, id) = (&response.header, &response.header.socket_id);
            Some((header.inode.into(), SocketAddr::new(id.source_address, id.source_port)))
        }));
    }
    Ok(found)
}

/// The listening sockets of one port, asked for again and again.
pub struct PortWatch {
    questions: Questions,
    port: u16,
    seen: BTreeSet<u64>,
    is_new: bool,
}

impl PortWatch {
    /// Watches a port of a namespace, which it holds. What listens now is new.
    pub fn open(netns: &Netns, port: u16) -> Result<Self, ListenersError> {
        let list = |source| ListenersError::List { netns: netns.name().to_owned(), source };
        let questions = Questions::open(netns, NETLINK_SOCK_DIAG)?.map_err(list)?;
        Ok(Self { questions, port, seen: BTreeSet::new(), is_new: false })
    }

    /// Whether a socket listens that did not when [`PortWatch::reported`] was last called.
    pub fn has_new(&mut self) -> io::Result<bool> {
        let now: BTreeSet<u64> =
            ask_for(&mut self.questions, self.port)?.into_iter().map(|(inode, _)| inode).collect();
        self.is_new |= !now.is_subset(&self.seen);
        self.seen = now;
        Ok(self.is_new)
    }

    /// What was new is known.
    pub fn reported(&mut self) {
        self.is_new = false;
    }
}

/// All that listens, from /proc and for the calling thread's namespace.
fn read() -> Result<Vec<(u64, SocketAddr)>, ProcError> {
    // The thread's own entry: that of the process shows the namespace of its first thread.
    let thread = Process::new(rustix::thread::gettid().as_raw_nonzero().get())?;
    let tcp6 = match thread.tcp6() {
        // A kernel without IPv6.
        Err(ProcError::NotFound(_)) => Vec::new(),
        entries => entries?,
    };
    let entries = thread.tcp()?.into_iter().chain(tcp6).filter(|entry| entry.state == TcpState::Listen);
    Ok(entries.map(|entry| (entry.inode, entry.local_address)).collect())
}

/// How many descriptors of a process are looked at before those of the next.
const FEW: usize = 128;
const TOO_MANY: &str = "the processes have more descriptors than are looked through in 20 ms";

/// Looking through descriptors, of which a pod may have millions.
struct Walk {
    left: u32,
    until: Instant,
}

impl Walk {
    /// However slow the machine is, so many are looked at.
    const LEAST: u32 = 4096;
    const TIME: Duration = Duration::from_millis(20);

    fn start() -> Self {
        Self { left: Self::LEAST, until: Instant::now() + Self::TIME }
    }

    fn is_over(&self) -> bool {
        self.left == 0 && Instant::now() >= self.until
    }
}

/// Moves those of the wanted sockets that the process has among these of its descriptors to `listeners`. Breaks where it
/// has more.
fn take(
    pid: Pid,
    range: Range<usize>,
    walk: &mut Walk,
    wanted: &mut BTreeMap<u64, SocketAddr>,
    listeners: &mut Vec<Listener>,
    causes: &mut BTreeMap<u64, io::Error>,
) -> ControlFlow<()> {
    // A process that is gone, or that may not be looked at, has nothing for us.
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { return ControlFlow::Continue(()) };
    for (number, entry) in entries.flatten().enumerate().skip(range.start) {
        if number >= range.end || walk.is_over() {
            return ControlFlow::Break(());
        }
        walk.left = walk.left.saturating_sub(1);
        let Some(number) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let Some(inode) = fs::read_link(entry.path()).ok().and_then(|link| socket_inode(link.to_str()?))
        else {
            continue;
        };
        let Some(&address) = wanted.get(&inode) else { continue };
        match duplicate(pid, number, inode, address) {
            Ok(Some(listener)) => {
                wanted.remove(&inode);
                listeners.push(listener);
            }
            // Closed or replaced meanwhile.
            Ok(None) => {}
            Err(error) => _ = causes.insert(inode, error),
        }
    }
    ControlFlow::Continue(())
}

fn duplicate(pid: Pid, number: i32, inode: u64, address: SocketAddr) -> io::Result<Option<Listener>> {
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    let fd = pidfd_getfd(&process, number, PidfdGetfdFlags::empty())?;
    if rustix::fs::fstat(&fd)?.st_ino != inode {
        return Ok(None);
    }
    let of_6 = rustix::net::sockopt::socket_domain(&fd)? == AddressFamily::INET6;
    let v6only = of_6 && rustix::net::sockopt::ipv6_v6only(&fd)?;
    let family = if of_6 { 6 } else { 4 };
    Ok(Some(Listener { family, addr: address.ip(), port: address.port(), v6only, inode, pid, fd }))
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

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::process::{Child, Command, Stdio};

    use rustix::net::{SocketFlags, SocketType, ipproto, socket_with};

    use super::*;
    use crate::testing::{TestCgroup, new_netns};

    const PROXY: u16 = 15001;
    const INBOUND: u16 = 15006;

    /// A namespace with the loopback interface up.
    fn network() -> Netns {
        let netns = new_netns();
        let up = || Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap();
        assert!(netns.run(up).unwrap().success());
        netns
    }

    /// Listens with SO_REUSEPORT; without IPv4 where that is an option.
    fn listen(address: &str) -> OwnedFd {
        let address: SocketAddr = address.parse().unwrap();
        let family = if address.is_ipv6() { AddressFamily::INET6 } else { AddressFamily::INET };
        let fd = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, Some(ipproto::TCP)).unwrap();
        rustix::net::sockopt::set_socket_reuseport(&fd, true).unwrap();
        if address.is_ipv6() {
            rustix::net::sockopt::set_ipv6_v6only(&fd, true).unwrap();
        }
        rustix::net::bind(&fd, &address).unwrap();
        rustix::net::listen(&fd, 16).unwrap();
        fd
    }

    /// A process that will have the two sockets, and nothing else will.
    fn holder(one: OwnedFd, other: OwnedFd) -> Command {
        let mut command = Command::new("sleep");
        command.arg("600").stdin(Stdio::null()).stdout(Stdio::from(one)).stderr(Stdio::from(other));
        command
    }

    fn shown(found: &Found) -> Vec<(u8, String, bool)> {
        let show = |l: &Listener| (l.family, SocketAddr::new(l.addr, l.port).to_string(), l.v6only);
        let mut shown: Vec<_> = found.listeners.iter().map(show).collect();
        shown.sort();
        shown
    }

    #[test]
    fn listeners_of_the_pod_are_shared() {
        let (netns, mut test) = (network(), TestCgroup::new());
        let mut hold = |one: &str, other: &str| {
            netns.run(|| test.spawn("proxy", &mut holder(listen(one), listen(other)))).unwrap();
        };
        hold("0.0.0.0:15001", "[::]:15001");
        // A group of two, and a port that nobody asks for.
        hold("127.0.0.1:15006", "127.0.0.1:15006");
        hold("0.0.0.0:15090", "[::1]:15006");
        let found = find(&netns, &test.cgroup, &[PROXY, INBOUND]).unwrap();
        assert_eq!(
            shown(&found),
            [
                (4, "0.0.0.0:15001".to_owned(), false),
                (4, "127.0.0.1:15006".to_owned(), false),
                (4, "127.0.0.1:15006".to_owned(), false),
                (6, "[::1]:15006".to_owned(), true),
                (6, "[::]:15001".to_owned(), true),
            ]
        );
        assert!(found.missed.is_empty(), "{found:?}");

        // The very socket: what comes in for it can be accepted here.
        let listener = found.listeners.into_iter().find(|l| l.family == 4 && l.port == PROXY).unwrap();
        let dialled = netns.run(|| TcpStream::connect("127.0.0.1:15001").unwrap()).unwrap();
        let (_accepted, peer) = TcpListener::from(listener.fd).accept().unwrap();
        assert_eq!(peer, dialled.local_addr().unwrap());
    }

    #[test]
    fn a_process_outside_the_cgroup_but_in_the_namespace_is_asked_too() {
        struct Killed(Child);
        impl Drop for Killed {
            fn drop(&mut self) {
                _ = self.0.kill();
                _ = self.0.wait();
            }
        }
        let (netns, test) = (network(), TestCgroup::new());
        let spawn = || holder(listen("0.0.0.0:15001"), listen("[::]:15006")).spawn().unwrap();
        let _process = Killed(netns.run(spawn).unwrap());
        let found = find(&netns, &test.cgroup, &[PROXY]).unwrap();
        assert_eq!(shown(&found), [(4, "0.0.0.0:15001".to_owned(), false)]);
    }

    #[test]
    fn a_listener_that_nobody_seen_has_is_reported() {
        let (netns, test) = (network(), TestCgroup::new());
        // This process has it, and is not in the namespace.
        let _listener = netns.run(|| listen("127.0.0.1:15001")).unwrap();
        let found = find(&netns, &test.cgroup, &[PROXY]).unwrap();
        assert!(found.listeners.is_empty(), "{found:?}");
        let [missed] = found.missed.as_slice() else { panic!("{found:?}") };
        assert_eq!(missed.address, "127.0.0.1:15001".parse().unwrap());
        assert!(missed.cause.is_none(), "{missed:?}");
    }

    #[test]
    fn both_lists_of_the_kernel_say_the_same() {
        let netns = network();
        let _listeners = netns.run(|| ["0.0.0.0:15001", "[::]:15001", "[::1]:7"].map(listen)).unwrap();
        let sorted = |mut list: Vec<_>| {
            list.sort_unstable();
            list
        };
        let listed = sorted(listed(&netns).unwrap().unwrap());
        assert_eq!(listed.len(), 3);
        assert_eq!(listed, sorted(netns.run(read).unwrap().unwrap()));
    }

    #[test]
    fn a_process_with_many_descriptors_hides_no_other_and_is_given_up() {
        let (netns, mut test) = (network(), TestCgroup::new());
        // Processes with as many descriptors as the limit allows; the last has the listener after all others.
        let script = "import os, socket, sys, time
l = socket.socket()
if sys.argv[2] == 'listen': l.bind(('127.0.0.1', 15001)); l.listen()
while True:
    try: last = os.dup(0)
    except OSError: break
os.dup2(l.fileno(), last); l.close(); os.close(last - 1)
open(sys.argv[1] + sys.argv[2], 'w'); time.sleep(600)";
        let folder = tempfile::tempdir().unwrap();
        for number in 0..9 {
            let role = if number == 8 { "listen".to_owned() } else { number.to_string() };
            let mut python = Command::new("python3");
            python.args(["-c", script]).arg(format!("{}/", folder.path().display())).arg(&role);
            netns.run(|| test.spawn("app", &mut python)).unwrap();
            let deadline = Instant::now() + Duration::from_secs(60);
            while !folder.path().join(&role).exists() {
                assert!(Instant::now() < deadline, "the process opens its descriptors");
                std::thread::yield_now();
            }
        }
        netns
            .run(|| test.spawn("proxy", &mut holder(listen("0.0.0.0:15006"), listen("[::]:15006"))))
            .unwrap();
        let started = Instant::now();
        let found = find(&netns, &test.cgroup, &[PROXY, INBOUND]).unwrap();
        assert_eq!(found.listeners.len(), 2, "{found:?}");
        let [missed] = found.missed.as_slice() else { panic!("{found:?}") };
        assert_eq!(missed.address.port(), PROXY);
        assert!(missed.cause.as_ref().is_some_and(|cause| cause.to_string() == TOO_MANY), "{missed:?}");
        assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    }

    #[test]
    fn nothing_is_found_where_nothing_listens() {
        let (netns, test) = (network(), TestCgroup::new());
        let found = find(&netns, &test.cgroup, &[PROXY, INBOUND]).unwrap();
        assert!(found.listeners.is_empty() && found.missed.is_empty(), "{found:?}");
    }
}
