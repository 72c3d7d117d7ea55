//! Datagrams.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use socket2::{Domain, Protocol, Socket, Type};
use tests::actor::Answer;
use tests::deadline::scaled;
use tests::unusual::{Method, UnusualOutcome, UnusualSocket};

const PATIENCE: Duration = Duration::from_secs(2);

pub(crate) fn socket(unusual: &UnusualSocket) -> Result<UdpSocket> {
    let any: SocketAddr = if unusual.to[0].is_ipv6() { "[::]:0" } else { "0.0.0.0:0" }.parse()?;
    let socket = UdpSocket::bind(any)?;
    socket.set_read_timeout(Some(scaled(PATIENCE)))?;
    Ok(socket)
}

/// Asks every destination by one socket. Servers and peers are those of the answers, in the order of the questions.
pub(crate) fn ask(unusual: &UnusualSocket, socket: &UdpSocket) -> UnusualOutcome {
    let mut outcome =
        UnusualOutcome { servers: Vec::new(), peers: Vec::new(), own: socket.local_addr().ok() };
    if unusual.method == Method::InTurn {
        for (nonce, to) in unusual.to.iter().enumerate() {
            match send(socket, nonce, *to).and_then(|()| receive(socket)) {
                Ok((answer, from)) => outcome.add(answer, from),
                Err(error) => outcome.servers.push(Err(format!("{error:#}"))),
            }
        }
        return outcome;
    }
    let sent = unusual.to.iter().enumerate().try_for_each(|(nonce, to)| send(socket, nonce, *to));
    if let Err(error) = sent {
        outcome.servers.push(Err(format!("{error:#}")));
        return outcome;
    }
    let mut answers = Vec::new();
    while answers.len() < unusual.to.len() {
        match receive(socket) {
            Ok(answer) => answers.push(answer),
            Err(error) => {
                outcome.servers.push(Err(format!("{error:#}")));
                return outcome;
            }
        }
    }
    answers.sort_by_key(|(answer, _)| answer.nonce);
    answers.into_iter().for_each(|(answer, from)| outcome.add(answer, from));
    outcome
}

trait AddAnswer {
    fn add(&mut self, answer: Answer, from: SocketAddr);
}

impl AddAnswer for UnusualOutcome {
    fn add(&mut self, answer: Answer, from: SocketAddr) {
        self.servers.push(Ok(answer.server));
        self.peers.push(from);
    }
}

fn send(socket: &UdpSocket, nonce: usize, to: SocketAddr) -> Result<()> {
    socket.send_to(&(nonce as u64).to_be_bytes(), to).context("sending")?;
    Ok(())
}

fn receive(socket: &UdpSocket) -> Result<(Answer, SocketAddr)> {
    let mut buffer = [0; 2048];
    let (length, from) = socket.recv_from(&mut buffer).context("receiving")?;
    Ok((serde_json::from_slice(&buffer[..length])?, from))
}

/// A raw socket, and the one that the answer comes to.
pub(crate) fn raw(unusual: &UnusualSocket) -> Result<(Socket, UdpSocket)> {
    let Method::Raw(source) = unusual.method else { bail!("not a raw socket") };
    let answers = UdpSocket::bind(SocketAddr::new(source, 0))?;
    answers.set_read_timeout(Some(scaled(PATIENCE)))?;
    let raw = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::UDP)).context("a raw socket")?;
    raw.bind(&SocketAddr::new(source, 0).into())?;
    Ok((raw, answers))
}

pub(crate) fn send_raw(unusual: &UnusualSocket, (raw, answers): &(Socket, UdpSocket)) -> UnusualOutcome {
    let mut outcome =
        UnusualOutcome { servers: Vec::new(), peers: Vec::new(), own: answers.local_addr().ok() };
    let to = unusual.to[0];
    let exchange = || -> Result<(Answer, SocketAddr)> {
        // Source, destination, length, and no checksum; then the number of the question.
        let mut packet = Vec::new();
        for word in [answers.local_addr()?.port(), to.port(), 16, 0] {
            packet.extend(word.to_be_bytes());
        }
        packet.extend(0u64.to_be_bytes());
        let addr: Ipv4Addr = to.ip().to_string().parse().context("IPv4 only")?;
        raw.send_to(&packet, &SocketAddr::from((addr, 0)).into()).context("sending raw")?;
        receive(answers)
    };
    match exchange() {
        Ok((answer, from)) => outcome.add(answer, from),
        Err(error) => outcome.servers.push(Err(format!("{error:#}"))),
    }
    outcome
}
