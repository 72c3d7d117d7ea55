//! Two pods with a node between them, and sockets of their proxies. A socket is created inside a pod by the user of its
//! proxy and passed to the test, so that one thread controls both ends.

pub mod cases;
pub mod churn;
pub mod envoys;

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, IoSlice, IoSliceMut, Read, Write},
    mem::MaybeUninit,
    net::{IpAddr, SocketAddr, TcpStream},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{net::UnixStream, process::CommandExt as _},
    },
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::maps::{Map, MapData, SkStorage};
use intercept_agent::facade::sys::Plain;
use intercept_common::{
    Family,
    acceleration::{self, TcpReason},
    names,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
        SendFlags, recvmsg, sendmsg,
    },
};
use socket2::{SockAddr, Socket};

use crate::{
    agent::{Agent, INIT_FLAGS},
    deadline::scaled,
    status::count_of,
    testbed::{
        Ids, Sandbox,
        netlink::{RouteSpec, TABLE_MAIN},
    },
};

/// The inbound port of the proxies.
pub const INBOUND: u16 = 15006;
/// The port of an application.
pub const APP: u16 = 8080;
/// The limit of every wait.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Two pods behind a namespace that forwards like a node.
#[derive(Debug)]
pub struct PodPair {
    /// The pod whose proxy connects.
    pub dialler: Sandbox,
    /// The pod whose proxy accepts.
    pub acceptor: Sandbox,
    /// The namespace between them.
    pub router: Sandbox,
}

impl PodPair {
    /// Creates the pods without capturing them.
    pub fn new(label: &str) -> Result<Self> {
        let pods = Self {
            dialler: Sandbox::new(&format!("{label}-d"))?,
            acceptor: Sandbox::new(&format!("{label}-a"))?,
            router: Sandbox::new(&format!("{label}-r"))?,
        };
        for (pod, n) in [(&pods.dialler, 1), (&pods.acceptor, 2)] {
            let far = format!("pod{n}");
            pod.netns.veth("eth0", &pods.router.netns, &far)?;
            for (of_pod, of_router) in [
                (format!("10.7{n}.0.2/24"), format!("10.7{n}.0.1/24")),
                (format!("fd7{n}::2/64"), format!("fd7{n}::1/64")),
            ] {
                let (of_pod, of_router): (ipnet::IpNet, ipnet::IpNet) = (of_pod.parse()?, of_router.parse()?);
                pod.netns.add_address("eth0", of_pod)?;
                pods.router.netns.add_address(&far, of_router)?;
                let everything = if of_pod.addr().is_ipv4() { "0.0.0.0/0" } else { "::/0" };
                pod.netns.add_route(RouteSpec {
                    to: everything.parse()?,
                    via: Some(of_router.addr()),
                    dev: Some("eth0"),
                    table: TABLE_MAIN,
                    local: false,
                })?;
            }
        }
        pods.router.netns.sysctl("net/ipv4/ip_forward", "1")?;
        pods.router.netns.sysctl("net/ipv6/conf/all/forwarding", "1")?;
        Ok(pods)
    }

    /// Creates the pods, captured and accelerated, with this test on the list of proxies.
    pub fn accelerated(label: &str, agent: &Agent) -> Result<Self> {
        let pods = Self::new(label)?;
        let name = own_name()?;
        let flags: Vec<_> =
            INIT_FLAGS.into_iter().chain(["--accelerate", "--accelerate-proxies", &name]).collect();
        for pod in [&pods.dialler, &pods.acceptor] {
            agent.attach(pod, &flags)?;
        }
        Ok(pods)
    }

    /// The address of the application in the accepting pod.
    pub fn app(family: Family) -> SocketAddr {
        let addr: IpAddr =
            if family == Family::V6 { [0xfd72, 0, 0, 0, 0, 0, 0, 2].into() } else { [10, 72, 0, 2].into() };
        SocketAddr::new(addr, APP)
    }

    /// Opens a listener of the accepting proxy. One of IPv6 accepts IPv4 as well.
    pub fn listen(&self, family: Family) -> Result<Socket> {
        listen(&self.acceptor, family, Ids::PROXY)
    }

    /// Connects the proxies to each other. Both ends are non-blocking.
    pub fn connect(&self, listener: &Socket, to: SocketAddr) -> Result<Leg> {
        let socket = socket(&self.dialler, Family::of(&to.ip()), Ids::PROXY, None)?;
        Leg::of(socket, listener, to)
    }
}

/// The name of this executable, for `--accelerate-proxies`.
pub fn own_name() -> Result<String> {
    let path = std::env::current_exe()?;
    Ok(path.file_name().unwrap_or_default().to_string_lossy().into_owned())
}

/// Creates a TCP socket inside a pod, charged to a memory cgroup if one is given.
pub fn socket(sandbox: &Sandbox, family: Family, ids: Ids, memory: Option<&Path>) -> Result<Socket> {
    let (ours, theirs) = UnixStream::pair()?;
    let memory =
        memory.map(|path| File::options().write(true).open(path.join("cgroup.procs"))).transpose()?;
    let mut command = sandbox.command(OsStr::new("true"))?;
    let domain = if family == Family::V6 { libc::AF_INET6 } else { libc::AF_INET };
    let make = move || -> io::Result<()> {
        if let Some(memory) = &memory {
            rustix::io::write(memory, b"0")?;
        }
        // SAFETY: plain system calls on numbers; the process has one thread.
        let socket = unsafe {
            if libc::setresgid(ids.gid, ids.gid, ids.gid) != 0
                || libc::setresuid(ids.uid, ids.uid, ids.uid) != 0
            {
                return Err(io::Error::last_os_error());
            }
            libc::socket(domain, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0)
        };
        if socket < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: it was just made, and is open until this process ends.
        let fds = [unsafe { std::os::fd::BorrowedFd::borrow_raw(socket) }];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&fds));
        sendmsg(&theirs, &[IoSlice::new(b"x")], &mut control, SendFlags::empty())?;
        Ok(())
    };
    // SAFETY: the closure makes system calls only; it neither allocates nor locks.
    unsafe { command.pre_exec(make) };
    let mut child = command.spawn().context("making a socket in a pod")?;
    // This closes the other end of the pair.
    drop(command);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    recvmsg(&ours, &mut [IoSliceMut::new(&mut [0])], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let passed: Option<OwnedFd> = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    child.wait()?;
    Ok(passed.context("a message without a socket")?.into())
}

/// Opens a listener on the inbound port.
pub fn listen(sandbox: &Sandbox, family: Family, ids: Ids) -> Result<Socket> {
    let listener = socket(sandbox, family, ids, None)?;
    listener.set_reuse_address(true)?;
    let any: IpAddr = if family == Family::V6 { [0u16; 8].into() } else { [0u8; 4].into() };
    if family == Family::V6 {
        listener.set_only_v6(false)?;
    }
    listener.bind(&SockAddr::from(SocketAddr::new(any, INBOUND)))?;
    listener.listen(1024)?;
    Ok(listener)
}

/// Both ends of one connection.
#[derive(Debug)]
pub struct Leg {
    /// The end in the pod that connected.
    pub dialled: TcpStream,
    /// The end in the pod that accepted.
    pub accepted: TcpStream,
}

impl Leg {
    /// Connects and accepts.
    pub fn of(socket: Socket, listener: &Socket, to: SocketAddr) -> Result<Self> {
        socket
            .connect_timeout(&SockAddr::from(to), scaled(PATIENCE))
            .with_context(|| format!("dialling {to}"))?;
        Self::accepted(socket, listener)
    }

    /// Accepts the other end of a socket that is connecting.
    pub fn accepted(dialled: Socket, listener: &Socket) -> Result<Self> {
        wait(listener, PollFlags::IN)?;
        let (accepted, _) = listener.accept()?;
        let leg = Self { dialled: dialled.into(), accepted: accepted.into() };
        for end in [&leg.dialled, &leg.accepted] {
            end.set_nonblocking(true)?;
            end.set_nodelay(true)?;
        }
        Ok(leg)
    }

    /// Exchanges the first bytes, after which the connection may be joined.
    pub fn greet(&self) -> Result<()> {
        pass(&self.dialled, &self.accepted, b"hello")?;
        pass(&self.accepted, &self.dialled, b"hello")
    }
}

/// Sends from one end to the other and reads it there. Returns whether the bytes bypassed TCP.
pub fn goes_past(from: &TcpStream, to: &TcpStream) -> Result<bool> {
    let before = given_to_tcp(from)?;
    pass(from, to, b"past or by")?;
    match given_to_tcp(from)? - before {
        0 => Ok(true),
        10 => Ok(false),
        other => bail!("{other} of 10 bytes went by TCP"),
    }
}

/// Sends bytes and reads them at the other end.
pub fn pass(from: &TcpStream, to: &TcpStream, bytes: &[u8]) -> Result<()> {
    send(from, bytes)?;
    let got = receive(to, bytes.len())?;
    ensure!(got == bytes, "other bytes than were sent");
    Ok(())
}

/// Sends all bytes. Waits while there is no room.
pub fn send(mut end: &TcpStream, mut bytes: &[u8]) -> Result<()> {
    while !bytes.is_empty() {
        match end.write(bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => wait(end, PollFlags::OUT)?,
            Err(error) => return Err(error).context("sending"),
        }
    }
    Ok(())
}

/// Reads this number of bytes. Waits for them.
pub fn receive(mut end: &TcpStream, length: usize) -> Result<Vec<u8>> {
    let (mut buffer, mut got) = (vec![0; length], 0);
    while got < length {
        match end.read(&mut buffer[got..]) {
            Ok(0) => bail!("the stream ended after {got} of {length} bytes"),
            Ok(read) => got += read,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => wait(end, PollFlags::IN)?,
            Err(error) => return Err(error).context("receiving"),
        }
    }
    Ok(buffer)
}

/// Waits until the socket is ready.
pub fn wait(end: impl AsFd, what: PollFlags) -> Result<()> {
    let patience = scaled(PATIENCE);
    let within = Timespec { tv_sec: patience.as_secs().cast_signed(), tv_nsec: 0 };
    ensure!(poll(&mut [PollFd::new(&end, what)], Some(&within))? > 0, "nothing in {patience:?}");
    Ok(())
}

/// Bytes that this end has sent by TCP or queued there.
pub fn given_to_tcp(end: &TcpStream) -> Result<u64> {
    // Of struct tcp_info (linux/tcp.h).
    const NOTSENT_BYTES: usize = 144;
    const BYTES_SENT: usize = 200;
    const BYTES_RETRANS: usize = 208;
    let mut info = [0u8; 232];
    let mut length = libc::socklen_t::try_from(info.len())?;
    // SAFETY: the kernel writes no more than the length says, into an array that outlives the call.
    let result = unsafe {
        libc::getsockopt(
            end.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    ensure!(result == 0, "asking for TCP_INFO: {}", io::Error::last_os_error());
    let word = |at: usize| u64::from_le_bytes(info[at..at + 8].try_into().unwrap_or_default());
    let waiting = u32::from_le_bytes(info[NOTSENT_BYTES..NOTSENT_BYTES + 4].try_into()?);
    Ok(word(BYTES_SENT) - word(BYTES_RETRANS) + u64::from(waiting))
}

/// Why the last message of an end went by TCP. Nothing if it was joined.
pub fn last(agent: &Agent, end: &TcpStream) -> Result<Option<TcpReason>> {
    let path = agent.store().join("maps").join(names::JOIN_SOCKETS);
    let map: SkStorage<_, Plain<acceleration::JoinSocket>> =
        Map::SkStorage(MapData::from_pin(&path)?).try_into()?;
    let last = map.get(end, 0).context("this end is not known")?.0.last;
    let pass = TcpReason::ALL.iter().find(|pass| **pass as u32 == last).copied();
    ensure!(pass.is_some() || last == acceleration::JoinSocket::JOINED, "{last} is not a reason");
    Ok(pass)
}

/// Bytes that the kernel accounts to the maps of ends and offers. They grow and shrink with the entries.
pub fn footprint(agent: &Agent) -> Result<[u64; 2]> {
    let memory = |name: &str| -> Result<u64> {
        let map = MapData::from_pin(agent.store().join("maps").join(name))?;
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", map.fd().as_fd().as_raw_fd()))?;
        let memory = info.lines().find_map(|line| line.strip_prefix("memlock:"));
        Ok(memory.with_context(|| format!("no size of map {name}"))?.trim().parse()?)
    };
    Ok([memory(names::JOIN_ENDS)?, memory(names::JOIN_OFFERS)?])
}

/// Memory that the kernel charges to a socket: received bytes, queued bytes and what is reserved.
pub fn charged(end: &TcpStream) -> Result<u64> {
    const RMEM_ALLOC: usize = 0;
    const FWD_ALLOC: usize = 4;
    const WMEM_QUEUED: usize = 5;
    const BACKLOG: usize = 7;
    let mut words = [0_u32; 9];
    let mut length = libc::socklen_t::try_from(size_of_val(&words))?;
    // SAFETY: the kernel writes no more than the length says, into an array that outlives the call.
    let result = unsafe {
        libc::getsockopt(
            end.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MEMINFO,
            words.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    ensure!(result == 0, "asking for SO_MEMINFO: {}", io::Error::last_os_error());
    Ok([RMEM_ALLOC, FWD_ALLOC, WMEM_QUEUED, BACKLOG].iter().map(|at| u64::from(words[*at])).sum())
}

/// Reads a socket option that is an int.
pub fn set_int(end: impl AsFd, level: libc::c_int, option: libc::c_int, value: libc::c_int) -> Result<()> {
    // SAFETY: the kernel reads one int, which outlives the call.
    let result = unsafe {
        libc::setsockopt(
            end.as_fd().as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            libc::socklen_t::try_from(size_of_val(&value))?,
        )
    };
    ensure!(result == 0, "setting option {option}: {}", io::Error::last_os_error());
    Ok(())
}

/// Counted ends of joined connections in a pod.
pub fn joined(agent: &Agent, pod: &Sandbox) -> Result<u64> {
    Ok(count_of(&agent.acceleration_of(pod)?.connections, "joined"))
}
