//! A small proxy: accepts, asks where the connection was going, connects there, and copies both ways.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use intercept_common::Family;
use socket2::{Domain, Protocol, Socket, Type};
use tests::actor::protocol::{ActorMessage, Done};
use tests::actor::{OriginalDst, Relay, RelayDirection, Relayed};
use tokio::io::copy_bidirectional_with_sizes;
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use crate::Output;
use crate::listen::listener;
use crate::options::{Privileged, original_dst, set_transparent};
use crate::pool::{Member, MemberPool};

const BUFFER: usize = 64 * 1024;

/// Opens a relay on as many threads as it asks for, all accepting from one socket.
pub(crate) fn open(
    pool: &mut MemberPool,
    privileged: &Privileged,
    relay: Relay,
    id: u64,
    output: &Output,
    reply: impl Fn(Done) + Send + 'static,
) -> Result<()> {
    let mut members = vec![pool.member(relay.bind.ids)?];
    for _ in 1..relay.workers {
        members.push(MemberPool::hire(relay.bind.ids)?);
    }
    // The socket is made by a thread of its owner, then shared out.
    let (made, socket) = std::sync::mpsc::channel();
    let (bind, root) = (relay.bind.clone(), privileged.clone());
    members[0].run(async move || {
        let listener = listener(&bind, &root).and_then(|listener| Ok(listener.into_std()?));
        drop(made.send(listener));
    });
    let listener = socket.recv().context("the thread of a relay ended early")??;
    let addr = listener.local_addr()?;
    let mut stops = Vec::new();
    for member in &members {
        stops.push(accept_on(
            member,
            listener.try_clone()?,
            relay.clone(),
            privileged.clone(),
            output.clone(),
        ));
    }
    pool.opened(id, stops);
    reply(Done::Ready(addr));
    Ok(())
}

fn accept_on(
    member: &Member,
    listener: std::net::TcpListener,
    relay: Relay,
    privileged: Privileged,
    output: Output,
) -> crate::pool::StopHandle {
    member.run_until_closed(async move || {
        let listener = TcpListener::from_std(listener).expect("the socket does not block");
        let shared = Rc::new((relay, privileged, output));
        loop {
            match listener.accept().await {
                Ok((client, peer)) => {
                    let shared = Rc::clone(&shared);
                    tokio::task::spawn_local(async move {
                        let (relay, privileged, output) = &*shared;
                        pass_on(client, peer, relay, privileged, output).await;
                    });
                }
                Err(error) => {
                    eprintln!("{}: accepting: {error}", shared.0.name);
                    tokio::task::yield_now().await;
                }
            }
        }
    })
}

async fn pass_on(
    mut client: TcpStream,
    peer: SocketAddr,
    relay: &Relay,
    privileged: &Privileged,
    output: &Output,
) {
    let Ok(local) = client.local_addr() else { return };
    let original_dst = original_dst(&client, local);
    let server = connect_onwards(original_dst, local, peer, relay, privileged).await;
    if relay.report {
        let error = server.as_ref().err().map(|error| format!("{error:#}"));
        let told = Relayed { relay: relay.name.clone(), original_dst, local, peer, error };
        // An error means that the writer is gone, and with it the reader.
        drop(output.send(ActorMessage::Relayed(told)));
    }
    if let Ok(mut server) = server {
        // Either side may have been reset; the other then learns it by the drop.
        drop(copy_bidirectional_with_sizes(&mut client, &mut server, BUFFER, BUFFER).await);
        if relay.reset {
            drop(reset_on_close(&server));
        }
    }
    if relay.reset {
        drop(reset_on_close(&client));
    }
}

async fn connect_onwards(
    original_dst: OriginalDst,
    local: SocketAddr,
    peer: SocketAddr,
    relay: &Relay,
    privileged: &Privileged,
) -> Result<TcpStream> {
    let to = match original_dst {
        OriginalDst::Addr(addr) => addr,
        // Under TPROXY the connection's own address is the destination.
        OriginalDst::Errno(_) if relay.bind.transparent => local,
        OriginalDst::Errno(errno) => {
            bail!("no original destination: {}", io::Error::from_raw_os_error(errno))
        }
    };
    let to = SocketAddr::new(to.ip().to_canonical(), to.port());
    if to.port() == relay.bind.addr.port() {
        bail!("the original destination {to} is the relay's own port");
    }
    let family = Family::of(&to.ip());
    let socket = Socket::new(Domain::for_address(to), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    match relay.direction {
        RelayDirection::Outbound => {}
        RelayDirection::Inbound => {
            let from: SocketAddr = if family == Family::V6 {
                // lo has ::6 only if it was added.
                socket.set_freebind_v6(true)?;
                (Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6), 0).into()
            } else {
                (Ipv4Addr::new(127, 0, 0, 6), 0).into()
            };
            socket.bind(&from.into()).with_context(|| format!("binding {from}"))?;
        }
        RelayDirection::InboundTransparent { mark } => {
            set_transparent(&socket, family, privileged)?;
            privileged.set(&socket, move |socket| socket.set_mark(mark)).context("marking a connection")?;
            // Another port than the client's: addresses and ports of the two connections would be the same.
            let from = SocketAddr::new(peer.ip().to_canonical(), 0);
            socket.bind(&from.into()).with_context(|| format!("binding {from}"))?;
        }
    }
    let socket = TcpSocket::from_std_stream(socket.into());
    socket.connect(to).await.with_context(|| format!("connecting to {to}"))
}

fn reset_on_close(stream: &TcpStream) -> io::Result<()> {
    Ok(rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO))?)
}
