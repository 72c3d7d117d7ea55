//! Connections.

use std::io::{self, BufRead, BufReader};
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result};
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, Type};
use tests::actor::Answer;
use tests::slip::{Manner, Slip, Slipped};

use crate::ring;

const PATIENCE: Duration = Duration::from_secs(2);

/// A socket that is not connected yet.
pub(crate) fn socket(slip: &Slip) -> Result<OwnedFd> {
    let protocol = if slip.manner == Manner::Multipath { Protocol::MPTCP } else { Protocol::TCP };
    let socket = Socket::new(Domain::for_address(slip.to[0]), Type::STREAM, Some(protocol));
    Ok(socket.context("making the socket")?.into())
}

/// Options that only the superuser may set.
pub(crate) fn prepare(slip: &Slip, socket: &OwnedFd) -> Result<()> {
    let socket = SockRef::from(socket);
    match &slip.manner {
        Manner::Mark(mark) => socket.set_mark(*mark).context("SO_MARK"),
        Manner::Device(name) => socket.bind_device(Some(name.as_bytes())).context("SO_BINDTODEVICE"),
        _ => Ok(()),
    }
}

/// What came of connecting it.
pub(crate) fn connected(slip: &Slip, socket: OwnedFd) -> Slipped {
    let mut slipped = Slipped { servers: Vec::new(), peers: Vec::new(), own: None };
    let stream = match connect(slip, socket) {
        Ok(stream) => stream,
        Err(error) => {
            slipped.servers.push(Err(format!("connecting: {error}")));
            return slipped;
        }
    };
    slipped.own = stream.local_addr().ok();
    slipped.peers.extend(stream.peer_addr().ok());
    slipped.servers.push(answer(stream).map_err(|error| format!("reading: {error}")));
    slipped
}

fn connect(slip: &Slip, socket: OwnedFd) -> io::Result<TcpStream> {
    let to = SockAddr::from(slip.to[0]);
    let as_socket = SockRef::from(&socket);
    as_socket.set_linger(Some(Duration::ZERO))?;
    as_socket.set_read_timeout(Some(PATIENCE))?;
    match slip.manner {
        Manner::IoUring => ring::connect(socket.as_fd(), &to)?,
        Manner::FastOpenSend => {
            as_socket.send_to_with_flags(b"early", &to, libc::MSG_FASTOPEN)?;
        }
        Manner::FastOpenConnect => {
            nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::TcpFastOpenConnect, &true)?;
            as_socket.connect(&to)?;
            as_socket.send(b"early")?;
        }
        _ => as_socket.connect_timeout(&to, PATIENCE)?,
    }
    Ok(TcpStream::from(socket))
}

fn answer(stream: TcpStream) -> io::Result<String> {
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    let answer: Answer = serde_json::from_str(&line).map_err(io::Error::other)?;
    Ok(answer.server)
}
