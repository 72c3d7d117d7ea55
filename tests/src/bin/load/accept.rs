//! The proxy: accepts, asks for the original destination more than once, and compares it with what the client says.

use std::io::{BufRead, Read, Write, stdin, stdout};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, poll};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tests::load::{Accept, LoadTally, read};

/// How long a client may take to say its word.
const PATIENCE: Duration = Duration::from_secs(5);

pub(crate) fn accept(accept: &Accept) -> Result<()> {
    let listener = listen(accept)?;
    answer("listening")?;
    let mut paused = accept.paused;
    let mut tally = LoadTally::default();
    let mut kept = Vec::new();
    loop {
        let stdin = stdin();
        let mut watched = [
            PollFd::new(&stdin, PollFlags::IN),
            PollFd::new(&listener, if paused { PollFlags::empty() } else { PollFlags::IN }),
        ];
        match poll(&mut watched, None) {
            Err(rustix::io::Errno::INTR) => continue,
            ready => ready.context("waiting for connections")?,
        };
        let (told, dialled) = (!watched[0].revents().is_empty(), !watched[1].revents().is_empty());
        if dialled && !paused {
            match listener.accept() {
                Ok((client, _)) => {
                    let dialled = compare(&client, &mut tally);
                    if accept.keep {
                        kept.extend(dialled.map(|dialled| (client, dialled)));
                    }
                }
                // Reset before it was accepted.
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionAborted => tally.silent += 1,
                Err(error) => return Err(error).context("accepting a connection"),
            }
        }
        if told {
            let mut line = String::new();
            // One line at a time is written, and answered before the next.
            if stdin.lock().read_line(&mut line)? == 0 {
                return Ok(());
            }
            match line.trim() {
                "tally" => answer(&serde_json::to_string(&std::mem::take(&mut tally))?)?,
                "again" => {
                    kept.iter().for_each(|(client, dialled)| judge(client, *dialled, &mut tally));
                    answer("again")?;
                }
                word => {
                    paused = word == "pause";
                    answer(word)?;
                }
            }
        }
    }
}

fn answer(line: &str) -> Result<()> {
    let mut output = stdout().lock();
    writeln!(output, "{line}")?;
    Ok(output.flush()?)
}

fn listen(accept: &Accept) -> Result<Socket> {
    let socket = Socket::new(Domain::for_address(accept.addr), Type::STREAM, Some(Protocol::TCP))?;
    if accept.addr.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.bind(&accept.addr.into()).with_context(|| format!("binding {}", accept.addr))?;
    socket.listen(accept.backlog)?;
    Ok(socket)
}

/// Asks before and after the client says where it dialled; gives what it said.
fn compare(client: &Socket, tally: &mut LoadTally) -> Option<SocketAddr> {
    let before = original(client);
    let mut said = [0; 18];
    drop(client.set_read_timeout(Some(PATIENCE)));
    let mut reader: &Socket = client;
    if reader.read_exact(&mut said).is_err() {
        tally.silent += 1;
        return None;
    }
    let dialled = read(said);
    let wrong = tally.wrong.len();
    if before.as_ref() == Ok(&dialled) {
        judge(client, dialled, tally);
    } else {
        tally.complain(format!("dialled {dialled}, told {before:?}"));
    }
    let mut writer: &Socket = client;
    // A client that closed early does not read it.
    drop(writer.write_all(if tally.wrong.len() == wrong { b"y" } else { b"n" }));
    Some(dialled)
}

/// Twice the same answer, and the one that the client expects.
fn judge(client: &Socket, dialled: SocketAddr, tally: &mut LoadTally) {
    let answers = [original(client), original(client)];
    if answers.iter().all(|answer| answer.as_ref() == Ok(&dialled)) {
        tally.right += 1;
    } else {
        tally.complain(format!("dialled {dialled}, told {answers:?}"));
    }
}

fn original(socket: &impl AsFd) -> Result<SocketAddr, String> {
    let socket = SockRef::from(socket);
    let local = socket.local_addr().map_err(|error| error.to_string())?.as_socket();
    let answer = match local.context("not of IP").map_err(|error| error.to_string())?.ip().to_canonical() {
        IpAddr::V4(_) => socket.original_dst_v4(),
        IpAddr::V6(_) => socket.original_dst_v6(),
    };
    let told = answer.map_err(|error| error.to_string())?;
    told.as_socket().ok_or_else(|| "another family".to_owned())
}
