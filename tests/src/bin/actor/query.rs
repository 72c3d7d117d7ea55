//! Sending datagrams and awaiting answers.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;

use tests::actor::{Answer, FlowStage, Queried, Query, QueryReply, Sending};
use tests::datagram;
use tokio::net::UdpSocket;
use tokio::time::{Instant, timeout_at};

use crate::options::mapped;

pub(crate) async fn query(query: Query) -> Queried {
    let mut seen =
        Queried { replies: vec![QueryReply::TimedOut; query.to.len()], sockname: None, peername: None };
    let to: Vec<SocketAddr> = query
        .to
        .iter()
        .map(|to| if query.mapped { SocketAddr::new(mapped(to.ip()), to.port()) } else { *to })
        .collect();
    if let Err((stage, error)) = exchange(&query, &to, &mut seen).await {
        let failed = QueryReply::Failed { stage, errno: error.raw_os_error().unwrap_or(0) };
        for reply in seen.replies.iter_mut().filter(|reply| **reply == QueryReply::TimedOut) {
            *reply = failed.clone();
        }
    }
    seen
}

async fn exchange(
    query: &Query,
    to: &[SocketAddr],
    seen: &mut Queried,
) -> Result<(), (FlowStage, io::Error)> {
    let at = |stage| move |error| (stage, error);
    let v6 = to.first().is_some_and(SocketAddr::is_ipv6);
    let from = match query.from {
        Some(from) if query.mapped => mapped(from),
        Some(from) => from,
        None if v6 => Ipv6Addr::UNSPECIFIED.into(),
        None => Ipv4Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind(SocketAddr::new(from, 0)).await.map_err(at(FlowStage::Bind))?;
    let content = |i: usize| (i as u64).to_be_bytes().to_vec();
    match query.sending {
        Sending::To => {
            for (i, to) in to.iter().enumerate() {
                socket.send_to(&content(i), to).await.map_err(at(FlowStage::Send))?;
            }
        }
        Sending::Connected => {
            for (i, to) in to.iter().enumerate() {
                socket.connect(to).await.map_err(at(FlowStage::Connect))?;
                socket.send(&content(i)).await.map_err(at(FlowStage::Send))?;
            }
        }
        Sending::Many => {
            let all: Vec<_> = to.iter().enumerate().map(|(i, to)| (content(i), *to)).collect();
            datagram::send_many(socket.as_fd(), &all).map_err(at(FlowStage::Send))?;
        }
    }
    seen.sockname = socket.local_addr().ok();
    seen.peername = socket.peer_addr().ok();
    let deadline = Instant::now() + query.timeout;
    let mut buffer = [0; 2048];
    for _ in to {
        let Ok(received) = timeout_at(deadline, socket.recv_from(&mut buffer)).await else { break };
        let (length, from) = received.map_err(at(FlowStage::Read))?;
        let Ok(answer) = serde_json::from_slice::<Answer>(&buffer[..length]) else { continue };
        if let Some(reply) = usize::try_from(answer.nonce).ok().and_then(|i| seen.replies.get_mut(i)) {
            *reply = QueryReply::Answered { from, answer };
        }
    }
    Ok(())
}
