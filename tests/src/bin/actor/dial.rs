//! Making connections.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tests::actor::{Dial, DialOutcome, Dialled, FlowStage};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use crate::options::mapped;

pub(crate) async fn dial(dial: Dial) -> Dialled {
    let mut seen = Dialled {
        outcome: DialOutcome::TimedOut(FlowStage::Connect),
        sockname: None,
        peername: None,
        peername_after: None,
    };
    let stream = match connect(&dial).await {
        Ok(stream) => stream,
        Err(outcome) => {
            seen.outcome = outcome;
            return seen;
        }
    };
    seen.sockname = stream.local_addr().ok();
    seen.peername = stream.peer_addr().ok();
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    seen.outcome = match timeout(dial.timeout, reader.read_line(&mut line)).await {
        Err(_) => DialOutcome::TimedOut(FlowStage::Read),
        Ok(Err(error)) => failed(FlowStage::Read, &error),
        Ok(Ok(0)) => DialOutcome::Dropped(FlowStage::Read),
        Ok(Ok(_)) => match serde_json::from_str(&line) {
            Ok(answer) => DialOutcome::Answered(answer),
            Err(_) => DialOutcome::Garbled(line),
        },
    };
    seen.peername_after = reader.get_ref().peer_addr().ok();
    seen
}

async fn connect(dial: &Dial) -> Result<TcpStream, DialOutcome> {
    let to = if dial.mapped { SocketAddr::new(mapped(dial.to.ip()), dial.to.port()) } else { dial.to };
    let at = |stage| move |error: io::Error| failed(stage, &error);
    let socket = if to.is_ipv6() { TcpSocket::new_v6() } else { TcpSocket::new_v4() };
    let socket = socket.map_err(at(FlowStage::Socket))?;
    // Closed by a reset: thousands of flows must not use up the ports by TIME_WAIT.
    rustix::net::sockopt::set_socket_linger(&socket, Some(Duration::ZERO))
        .map_err(|error| failed(FlowStage::Socket, &error.into()))?;
    if let Some(from) = dial.from {
        let from = if dial.mapped { mapped(from) } else { from };
        socket.bind(SocketAddr::new(from, 0)).map_err(at(FlowStage::Bind))?;
    }
    match timeout(dial.timeout, socket.connect(to)).await {
        Err(_) => Err(DialOutcome::TimedOut(FlowStage::Connect)),
        Ok(connected) => connected.map_err(at(FlowStage::Connect)),
    }
}

fn failed(stage: FlowStage, error: &io::Error) -> DialOutcome {
    match error.raw_os_error() {
        Some(libc::ECONNREFUSED) => DialOutcome::Refused,
        Some(libc::ECONNRESET) => DialOutcome::Dropped(stage),
        Some(libc::ETIMEDOUT) => DialOutcome::TimedOut(stage),
        errno => DialOutcome::Failed { stage, errno: errno.unwrap_or(0) },
    }
}
