//! Answering connections and datagrams.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use anyhow::Result;
use intercept_common::Family;
use socket2::SockRef;
use tests::actor::{Answer, Listen, Transport};
use tests::datagram;
use tests::deadline::scaled;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::time::timeout;

use crate::options::{Privileged, bound, original_dst};

/// How long a server waits for its client to close.
const PATIENCE: Duration = Duration::from_secs(5);
const BACKLOG: i32 = 4096;

/// A listening socket for connections.
pub(crate) fn listener(bind: &tests::actor::Bind, privileged: &Privileged) -> Result<TcpListener> {
    let socket = bound(bind, Transport::Tcp, privileged)?;
    socket.listen(BACKLOG)?;
    Ok(TcpListener::from_std(socket.into())?)
}

/// Answers connections, for ever.
pub(crate) async fn connections(
    listen: Listen,
    privileged: &Privileged,
    ready: impl FnOnce(SocketAddr),
) -> Result<()> {
    let listener = listener(&listen.bind, privileged)?;
    ready(listener.local_addr()?);
    let name: Rc<str> = listen.name.into();
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                let name = Rc::clone(&name);
                tokio::task::spawn_local(async move {
                    // A client that went away early is the client's business.
                    drop(answer(stream, peer, &name).await);
                });
            }
            // The client was gone before it was accepted, or descriptors are short for a moment.
            Err(error) => {
                eprintln!("{name}: accepting: {error}");
                tokio::task::yield_now().await;
            }
        }
    }
}

async fn answer(mut stream: TcpStream, peer: SocketAddr, name: &str) -> io::Result<()> {
    let local = stream.local_addr()?;
    let answer = Answer {
        server: name.to_owned(),
        original_dst: Some(original_dst(&stream, local)),
        local,
        peer,
        peername: stream.peer_addr().ok(),
        nonce: 0,
    };
    let mut line = serde_json::to_vec(&answer)?;
    line.push(b'\n');
    stream.write_all(&line).await?;
    stream.shutdown().await?;
    let mut rest = Vec::new();
    drop(timeout(scaled(PATIENCE), stream.read_to_end(&mut rest)).await);
    Ok(())
}

/// Answers datagrams, for ever.
pub(crate) async fn datagrams(
    listen: Listen,
    privileged: &Privileged,
    ready: impl FnOnce(SocketAddr),
) -> Result<()> {
    let family = Family::of(&listen.bind.addr.ip());
    let socket = bound(&listen.bind, Transport::Udp, privileged)?;
    datagram::want_destinations(&socket, family)?;
    let bound = socket.local_addr()?.as_socket().unwrap_or(listen.bind.addr);
    let socket = UdpSocket::from_std(socket.into())?;
    ready(bound);
    let mut buffer = [0; 2048];
    loop {
        socket.readable().await?;
        let raw = SockRef::from(&socket);
        match socket.try_io(Interest::READABLE, || datagram::receive(&raw, &mut buffer)) {
            Ok((length, peer, to)) => {
                let to = to.unwrap_or(bound.ip());
                let reply = reply(&listen.name, &buffer[..length], peer, to, bound.port());
                if let Err(error) = datagram::send_from(&raw, &reply, peer, to) {
                    eprintln!("{}: answering {peer} from {to}: {error}", listen.name);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // An earlier answer came back as unreachable.
            Err(error) => eprintln!("{}: receiving: {error}", listen.name),
        }
    }
}

fn reply(name: &str, content: &[u8], peer: SocketAddr, to: IpAddr, port: u16) -> Vec<u8> {
    let nonce = content.first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes));
    let answer = Answer {
        server: name.to_owned(),
        original_dst: None,
        local: SocketAddr::new(to, port),
        peer,
        peername: None,
        nonce,
    };
    serde_json::to_vec(&answer).expect("an answer is plain data")
}
