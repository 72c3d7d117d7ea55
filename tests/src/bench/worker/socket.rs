//! Non-blocking sockets and an epoll instance.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, accept_with, bind, connect, socket_with, sockopt};

const BACKLOG: i32 = 4096;
const EVENTS: usize = 256;

/// A listener on all IPv4 addresses, as sidecar proxies have it.
pub(super) fn listen(port: u16) -> Result<OwnedFd> {
    let addr = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
    let make = || -> rustix::io::Result<OwnedFd> {
        let socket = stream()?;
        sockopt::set_socket_reuseaddr(&socket, true)?;
        // Several processes share the port, because one may not have enough descriptors.
        sockopt::set_socket_reuseport(&socket, true)?;
        bind(&socket, &addr)?;
        rustix::net::listen(&socket, BACKLOG)?;
        Ok(socket)
    };
    make().with_context(|| format!("listening on {addr}"))
}

/// Accepts the next connection. `None` if there is none now.
pub(super) fn accept(listener: &OwnedFd) -> Result<Option<OwnedFd>> {
    match accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
        Ok(socket) => {
            prepare(&socket).context("preparing an accepted connection")?;
            Ok(Some(socket))
        }
        Err(Errno::AGAIN | Errno::CONNABORTED | Errno::INTR) => Ok(None),
        Err(error) => Err(error).context("accepting a connection"),
    }
}

/// A connection that is being opened.
pub(super) fn dial(to: SocketAddr, from: Option<IpAddr>) -> rustix::io::Result<OwnedFd> {
    let socket = stream()?;
    prepare(&socket)?;
    if let Some(from) = from {
        bind(&socket, &SocketAddr::new(from, 0))?;
    }
    match connect(&socket, &to) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(error) => Err(error),
    }
}

fn stream() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)
}

/// Closing resets the connection. Sockets in TIME_WAIT would use up the ports, which would distort the measurement.
fn prepare(socket: &OwnedFd) -> rustix::io::Result<()> {
    sockopt::set_socket_linger(socket, Some(Duration::ZERO))?;
    sockopt::set_tcp_nodelay(socket, true)
}

/// An epoll instance, edge-triggered.
pub(super) struct Poller {
    epoll: OwnedFd,
    events: Vec<Event>,
}

/// What happened to a socket.
#[derive(Debug, Clone, Copy)]
pub(super) struct SocketReadiness {
    /// The token of the socket.
    pub(super) token: u64,
    /// It is readable, or the peer has closed.
    pub(super) readable: bool,
    /// It is writable.
    pub(super) writable: bool,
    /// The peer has closed, or the connection failed.
    pub(super) closing: bool,
}

impl Poller {
    pub(super) fn new() -> Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC).context("creating an epoll instance")?;
        Ok(Self { epoll, events: Vec::with_capacity(EVENTS) })
    }

    /// Registers a listener, level-triggered: events as long as connections wait.
    pub(super) fn add_listener(&self, listener: &OwnedFd, token: u64) -> Result<()> {
        epoll::add(&self.epoll, listener, EventData::new_u64(token), EventFlags::IN)
            .context("watching a listener")
    }

    /// Registers a connection, edge-triggered: one event for each change.
    pub(super) fn add(&self, socket: impl AsFd, token: u64) -> Result<()> {
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        epoll::add(&self.epoll, socket, EventData::new_u64(token), flags).context("watching a connection")
    }

    /// Waits for events. None at the deadline.
    pub(super) fn wait(
        &mut self,
        deadline: Option<Instant>,
    ) -> Result<impl Iterator<Item = SocketReadiness> + use<'_>> {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let timeout = left.map(|left| Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        });
        self.events.clear();
        match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut self.events), timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error).context("waiting for events"),
        }
        Ok(self.events.iter().map(|event| {
            let flags = event.flags;
            let closing = flags.intersects(EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR);
            SocketReadiness {
                token: event.data.u64(),
                readable: closing || flags.contains(EventFlags::IN),
                writable: flags.contains(EventFlags::OUT),
                closing,
            }
        }))
    }
}

/// The result of reading or writing without waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum IoStep {
    /// This many bytes.
    Bytes(usize),
    /// It would block.
    Later,
    /// The peer sends no more.
    End,
    /// The connection failed or was reset. The kernel reports the error only once.
    Broken(Errno),
}

pub(super) fn read(socket: &OwnedFd, buffer: &mut [u8]) -> IoStep {
    match rustix::io::read(socket, buffer) {
        Ok(0) => IoStep::End,
        Ok(n) => IoStep::Bytes(n),
        Err(Errno::AGAIN | Errno::INTR) => IoStep::Later,
        Err(error) => IoStep::Broken(error),
    }
}

pub(super) fn write(socket: &OwnedFd, bytes: &[u8]) -> IoStep {
    match rustix::net::send(socket, bytes, rustix::net::SendFlags::NOSIGNAL) {
        Ok(n) => IoStep::Bytes(n),
        Err(Errno::AGAIN | Errno::INTR) => IoStep::Later,
        Err(error) => IoStep::Broken(error),
    }
}
