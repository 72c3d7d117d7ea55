//! Connections.

use std::io::{self, BufRead, BufReader};
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result};
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, Type};
use tests::actor::Answer;
use tests::deadline::scaled;
use tests::unusual::{Method, UnusualOutcome, UnusualSocket};

use crate::ring;

const PATIENCE: Duration = Duration::from_secs(2);

/// A socket that is not connected yet.
pub(crate) fn socket(unusual: &UnusualSocket) -> Result<OwnedFd> {
    let protocol = if unusual.method == Method::Multipath { Protocol::MPTCP } else { Protocol::TCP };
    let socket = Socket::new(Domain::for_address(unusual.to[0]), Type::STREAM, Some(protocol));
    Ok(socket.context("making the socket")?.into())
}

/// Options that only the superuser may set.
pub(crate) fn prepare(unusual: &UnusualSocket, socket: &OwnedFd) -> Result<()> {
    let socket = SockRef::from(socket);
    match &unusual.method {
        Method::Mark(mark) => socket.set_mark(*mark).context("SO_MARK"),
        Method::Device(name) => socket.bind_device(Some(name.as_bytes())).context("SO_BINDTODEVICE"),
        _ => Ok(()),
    }
}

/// What came of connecting it.
pub(crate) fn connected(unusual: &UnusualSocket, socket: OwnedFd) -> UnusualOutcome {
    let mut outcome = UnusualOutcome { servers: Vec::new(), peers: Vec::new(), own: None };
    let stream = match connect(unusual, socket) {
        Ok(stream) => stream,
        Err(error) => {
            outcome.servers.push(Err(format!("connecting: {error}")));
            return outcome;
        }
    };
    outcome.own = stream.local_addr().ok();
    outcome.peers.extend(stream.peer_addr().ok());
    outcome.servers.push(answer(stream).map_err(|error| format!("reading: {error}")));
    outcome
}

fn connect(unusual: &UnusualSocket, socket: OwnedFd) -> io::Result<TcpStream> {
    let to = SockAddr::from(unusual.to[0]);
    let as_socket = SockRef::from(&socket);
    as_socket.set_linger(Some(Duration::ZERO))?;
    as_socket.set_read_timeout(Some(scaled(PATIENCE)))?;
    match unusual.method {
        Method::IoUring => ring::connect(socket.as_fd(), &to)?,
        Method::FastOpenSend => {
            as_socket.send_to_with_flags(b"early", &to, libc::MSG_FASTOPEN)?;
        }
        Method::FastOpenConnect => {
            nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::TcpFastOpenConnect, &true)?;
            as_socket.connect(&to)?;
            as_socket.send(b"early")?;
        }
        _ => as_socket.connect_timeout(&to, scaled(PATIENCE))?,
    }
    Ok(TcpStream::from(socket))
}

fn answer(stream: TcpStream) -> io::Result<String> {
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    let answer: Answer = serde_json::from_str(&line).map_err(io::Error::other)?;
    Ok(answer.server)
}
