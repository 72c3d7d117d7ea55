//! Making connections.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tests::actor::{Dial, Dialled, Outcome, Stage};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use crate::options::mapped;

pub(crate) async fn dial(dial: Dial) -> Dialled {
    let mut seen = Dialled {
        outcome: Outcome::TimedOut(Stage::Connect),
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
        Err(_) => Outcome::TimedOut(Stage::Read),
        Ok(Err(error)) => failed(Stage::Read, &error),
        Ok(Ok(0)) => Outcome::Dropped(Stage::Read),
        Ok(Ok(_)) => match serde_json::from_str(&line) {
            Ok(answer) => Outcome::Answered(answer),
            Err(_) => Outcome::Garbled(line),
        },
    };
    seen.peername_after = reader.get_ref().peer_addr().ok();
    seen
}

async fn connect(dial: &Dial) -> Result<TcpStream, Outcome> {
    let to = if dial.mapped { SocketAddr::new(mapped(dial.to.ip()), dial.to.port()) } else { dial.to };
    let at = |stage| move |error: io::Error| failed(stage, &error);
    let socket = if to.is_ipv6() { TcpSocket::new_v6() } else { TcpSocket::new_v4() };
    let socket = socket.map_err(at(Stage::Socket))?;
    // Closed by a reset: thousands of flows must not use up the ports by TIME_WAIT.
    rustix::net::sockopt::set_socket_linger(&socket, Some(Duration::ZERO))
        .map_err(|error| failed(Stage::Socket, &error.into()))?;
    if let Some(from) = dial.from {
        let from = if dial.mapped { mapped(from) } else { from };
        socket.bind(SocketAddr::new(from, 0)).map_err(at(Stage::Bind))?;
    }
    match timeout(dial.timeout, socket.connect(to)).await {
        Err(_) => Err(Outcome::TimedOut(Stage::Connect)),
        Ok(connected) => connected.map_err(at(Stage::Connect)),
    }
}

fn failed(stage: Stage, error: &io::Error) -> Outcome {
    match error.raw_os_error() {
        Some(libc::ECONNREFUSED) => Outcome::Refused,
        Some(libc::ECONNRESET) => Outcome::Dropped(stage),
        Some(libc::ETIMEDOUT) => Outcome::TimedOut(stage),
        errno => Outcome::Failed { stage, errno: errno.unwrap_or(0) },
    }
}
