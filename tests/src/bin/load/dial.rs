//! The clients: threads that make one connection after the other.

use std::io::{Read, Write, stdin, stdout};
use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use nix::sys::socket::{setsockopt, sockopt::TcpFastOpenConnect};
use rustix::net::{SendFlags, sendto};
use socket2::{Domain, Protocol, Socket, Type};
use tests::load::{LoadDial, LoadMethod, LoadTally, spell};

/// How long the proxy may take to answer.
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn dial(dial: LoadDial) -> Result<()> {
    let next = AtomicU32::new(0);
    let tally = Mutex::new(LoadTally::default());
    let kept = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..dial.threads {
            scope.spawn(|| {
                let mut own = LoadTally::default();
                let mut open = Vec::new();
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    if n >= dial.count {
                        break;
                    }
                    match one(&dial, n) {
                        Ok(socket) => {
                            own.right += 1;
                            open.extend(socket);
                        }
                        Err(error) => own.complain(format!("{error:#}")),
                    }
                }
                kept.lock().expect("no thread panics").extend(open);
                let mut tally = tally.lock().expect("no thread panics");
                *tally = std::mem::take(&mut *tally).and(own);
            });
        }
    });
    let tally = tally.into_inner().expect("no thread panics");
    let mut output = stdout().lock();
    writeln!(output, "{}", serde_json::to_string(&tally)?)?;
    output.flush()?;
    // Held connections stay open until the input ends.
    std::io::copy(&mut stdin().lock(), &mut std::io::sink())?;
    Ok(())
}

/// One connection; the socket if it is to be kept.
fn one(dial: &LoadDial, n: u32) -> Result<Option<Socket>> {
    let to = dial.to[n as usize % dial.to.len()];
    let socket =
        Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP)).context("a socket")?;
    socket.set_read_timeout(Some(PATIENCE))?;
    if let Some(from) = dial.from {
        let port = from.port() + u16::try_from(n).context("too many for one source")?;
        socket.set_reuse_address(true)?;
        socket.bind(&SocketAddr::new(from.ip(), port).into()).context("binding")?;
    }
    match dial.method {
        LoadMethod::Answered | LoadMethod::Held => {
            socket.connect(&to.into()).context("connecting")?;
            say(&socket, to)?;
        }
        LoadMethod::Early => {
            socket.connect(&to.into()).context("connecting")?;
            return say(&socket, to).map(|()| None);
        }
        LoadMethod::FastOpenSend | LoadMethod::EarlyFastOpen => {
            let flag = SendFlags::from_bits_retain(libc::MSG_FASTOPEN.cast_unsigned());
            let sent = sendto(&socket, &spell(to), flag, &to).context("sending with the SYN")?;
            ensure!(sent == 18, "sent {sent} bytes with the SYN");
            if dial.method == LoadMethod::EarlyFastOpen {
                return Ok(None);
            }
        }
        LoadMethod::FastOpenConnect => {
            setsockopt(&socket, TcpFastOpenConnect, &true).context("TCP_FASTOPEN_CONNECT")?;
            socket.connect(&to.into()).context("connecting")?;
            say(&socket, to)?;
        }
        LoadMethod::Abandoned => {
            socket.set_linger(Some(Duration::ZERO))?;
            socket.set_nonblocking(true)?;
            return match socket.connect(&to.into()) {
                Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => {
                    Err(error).context("connecting")
                }
                _ => Ok(None),
            };
        }
        LoadMethod::Refused => {
            return match socket.connect(&to.into()) {
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => Ok(None),
                other => Err(anyhow!("{other:?} in place of a refusal")),
            };
        }
    }
    let mut word = [0];
    let mut reader = &socket;
    reader.read_exact(&mut word).context("reading the verdict")?;
    ensure!(word == *b"y", "the proxy was told another destination");
    ensure!(peer(&socket)? == to, "getpeername says {} in place of {to}", peer(&socket)?);
    // Closed by a reset: nothing is to wait for the ports.
    socket.set_linger(Some(Duration::ZERO))?;
    if dial.method == LoadMethod::Held {
        return Ok(Some(socket));
    }
    ensure!(reader.read(&mut word).context("waiting for the proxy to close")? == 0, "more than a verdict");
    ensure!(peer(&socket)? == to, "after the proxy closed, getpeername says {}", peer(&socket)?);
    Ok(None)
}

fn say(socket: &Socket, to: SocketAddr) -> Result<()> {
    let mut writer = socket;
    writer.write_all(&spell(to)).context("saying where to")
}

fn peer(socket: &Socket) -> Result<SocketAddr> {
    socket.peer_addr().context("getpeername")?.as_socket().context("not of IP")
}
