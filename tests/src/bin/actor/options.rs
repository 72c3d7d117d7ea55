//! Socket options, those that need privileges included.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::mpsc;

use anyhow::{Context, Result, anyhow};
use intercept_common::Family;
use socket2::{Domain, Protocol, Socket, Type};
use tests::actor::{Bind, OriginalDst, Transport};

type PrivilegedJob = Box<dyn FnOnce() + Send>;

/// A thread that stays root and sets on others' sockets what only root may.
#[derive(Clone)]
pub(crate) struct Privileged(mpsc::Sender<PrivilegedJob>);

impl Privileged {
    pub(crate) fn start() -> Self {
        let (jobs, inbox) = mpsc::channel::<PrivilegedJob>();
        std::thread::spawn(move || inbox.into_iter().for_each(|job| job()));
        Self(jobs)
    }

    /// Sets an option on a socket and waits for it, which takes microseconds.
    pub(crate) fn set(
        &self,
        socket: &Socket,
        option: impl FnOnce(&Socket) -> io::Result<()> + Send + 'static,
    ) -> Result<()> {
        let socket = socket.try_clone()?;
        let (done, result) = mpsc::channel();
        let job = move || drop(done.send(option(&socket)));
        self.0.send(Box::new(job)).map_err(|_| anyhow!("the privileged thread is gone"))?;
        Ok(result.recv()??)
    }
}

/// A bound socket that does not block; a stream socket is not yet listening.
pub(crate) fn bound(bind: &Bind, transport: Transport, privileged: &Privileged) -> Result<Socket> {
    let kind = match transport {
        Transport::Tcp => (Type::STREAM, Protocol::TCP),
        Transport::Udp => (Type::DGRAM, Protocol::UDP),
    };
    let socket = Socket::new(Domain::for_address(bind.addr), kind.0.nonblocking(), Some(kind.1))?;
    if bind.addr.is_ipv6() {
        socket.set_only_v6(bind.v6only)?;
    }
    socket.set_reuse_address(transport == Transport::Tcp)?;
    socket.set_reuse_port(bind.reuseport)?;
    if bind.transparent {
        set_transparent(&socket, Family::of(&bind.addr.ip()), privileged)?;
    }
    socket.bind(&bind.addr.into()).with_context(|| format!("binding {}", bind.addr))?;
    Ok(socket)
}

/// IP_TRANSPARENT; an IPv6 socket gets it for IPv4 too.
pub(crate) fn set_transparent(socket: &Socket, family: Family, privileged: &Privileged) -> Result<()> {
    privileged
        .set(socket, move |socket| {
            if family == Family::V6 {
                socket.set_ip_transparent_v6(true)
            } else {
                socket.set_ip_transparent_v4(true)
            }
        })
        .context("setting IP_TRANSPARENT (needs CAP_NET_ADMIN)")
}

/// The original destination of an accepted connection, asked of the level that fits its own address.
pub(crate) fn original_dst(socket: &impl AsFd, local: SocketAddr) -> OriginalDst {
    let socket = socket2::SockRef::from(socket);
    let answer = match local.ip().to_canonical() {
        IpAddr::V4(_) => socket.original_dst_v4(),
        IpAddr::V6(_) => socket.original_dst_v6(),
    };
    match answer.map(|addr| addr.as_socket()) {
        Ok(Some(addr)) => OriginalDst::Addr(addr),
        // An answer of another family than asked for is none.
        Ok(None) => OriginalDst::Errno(libc::EAFNOSUPPORT),
        Err(error) => OriginalDst::Errno(error.raw_os_error().unwrap_or(0)),
    }
}

/// The address as an IPv6 socket spells it.
pub(crate) fn mapped(addr: IpAddr) -> IpAddr {
    match addr {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().into(),
        v6 @ IpAddr::V6(_) => v6,
    }
}
