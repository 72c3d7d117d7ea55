//! Checks of wake-ups of sleeping readers.

use std::{
    io::{ErrorKind, Read as _},
    net::{Shutdown, TcpStream},
    time::Duration,
};

use rustix::event::{Timespec, epoll};

use super::ends::{
    Fault, PATIENCE, PIECE, Seen, Sleeper, SocketPair, both, call, ended, expect, read, read_exact, receive,
    send, write_all,
};

/// Enough rounds for a race to be lost at least once.
const ROUNDS: usize = 100;

/// Bytes of one direction in checks that are not about their number.
const SOME: usize = 512 << 10;

/// Sends a byte and a reply, each to a reader in `recv`.
pub(super) fn blocking_receive(ends: SocketPair) -> Seen {
    let sleeper = Sleeper::default();
    let is = |got: u8, expected: u8, round: usize| {
        expect(got == expected, || format!("the wrong byte in round {round}"))
    };
    let asks = || {
        for round in 0..ROUNDS {
            let mut got = [0];
            sleeper.sleeps()?;
            call("sending", || write_all(&ends.client, &[1]))?;
            call("waiting for the reply", || read_exact(&ends.client, &mut got))?;
            is(got[0], 2, round)?;
        }
        Ok(())
    };
    let answers = || {
        for round in 0..ROUNDS {
            let mut got = [0];
            sleeper.about_to_sleep();
            call("waiting in recv", || read_exact(&ends.server, &mut got))?;
            call("answering", || write_all(&ends.server, &[2]))?;
            is(got[0], 1, round)?;
        }
        Ok(())
    };
    both(asks, answers)?;
    Ok(format!("woken {ROUNDS} times"))
}

/// The same with a reader in edge-triggered `epoll_wait` that reads until EAGAIN.
pub(super) fn epoll_edge(ends: SocketPair) -> Seen {
    let sleeper = Sleeper::default();
    call("setting the socket non-blocking", || ends.server.set_nonblocking(true))?;
    let waker = || {
        for round in 0..ROUNDS {
            sleeper.sleeps()?;
            call("sending", || write_all(&ends.client, &vec![1; 1 + round * 7 % 3000]))?;
            call("waiting for the reply", || read_exact(&ends.client, &mut [0]))?;
        }
        call("shutting down", || ends.client.shutdown(Shutdown::Write))
    };
    let woken = || {
        let epoll = call("creating an epoll instance", || epoll::create(epoll::CreateFlags::CLOEXEC))?;
        let interest = epoll::EventFlags::IN | epoll::EventFlags::ET;
        call("adding to the epoll instance", || {
            epoll::add(&epoll, &ends.server, epoll::EventData::new_u64(0), interest)
        })?;
        let mut round = 0;
        // The first event reports the state of a socket that was just added.
        let mut wanted = 1;
        loop {
            sleeper.about_to_sleep();
            wait(&epoll)?;
            let Some(got) = drain(&ends.server)? else { break };
            // A message may arrive in two parts with an event each.
            wanted -= got.min(wanted);
            if wanted == 0 {
                call("answering", || write_all(&ends.server, &[2]))?;
                round += 1;
                wanted = 1 + round * 7 % 3000;
            }
        }
        expect(round == ROUNDS, || format!("the stream ended after {round} of {ROUNDS} messages"))
    };
    both(waker, woken)?;
    Ok(format!("an edge for each of {ROUNDS} messages and for the end"))
}

fn wait(epoll: impl std::os::fd::AsFd) -> Result<(), Fault> {
    let mut events = Vec::with_capacity(4);
    let within = Timespec { tv_sec: PATIENCE.as_secs().cast_signed(), tv_nsec: 0 };
    let found = call("waiting in epoll_wait", || {
        epoll::wait(&epoll, rustix::buffer::spare_capacity(&mut events), Some(&within))
    })?;
    expect(found > 0, || format!("no event in {} s", PATIENCE.as_secs()))
}

/// Returns the number of bytes read; `None` at the end of the stream.
fn drain(mut end: &TcpStream) -> Result<Option<usize>, Fault> {
    let mut sum = 0;
    loop {
        match end.read(&mut [0; 1000]) {
            Ok(0) => return Ok(None),
            Ok(read) => sum += read,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Some(sum)),
            Err(error) => {
                return Err(Fault::Call { what: "receiving", error, after: Duration::ZERO });
            }
        }
    }
}

/// One end shuts down its direction. The other direction still works.
pub(super) fn half_close(ends: SocketPair) -> Seen {
    let sizes = || std::iter::repeat(PIECE);
    let client = || {
        send(&ends.client, 1, SOME, sizes())?;
        call("shutting down", || ends.client.shutdown(Shutdown::Write))?;
        receive(&ends.client, 2, SOME, sizes())?;
        ended(&ends.client)
    };
    let server = || {
        receive(&ends.server, 1, SOME, sizes())?;
        ended(&ends.server)?;
        send(&ends.server, 2, SOME, sizes())?;
        call("shutting down", || ends.server.shutdown(Shutdown::Write))
    };
    both(client, server)?;
    Ok(format!("{} KiB after the end of the other direction", SOME >> 10))
}

/// One end is closed while the other sleeps in `recv`.
pub(super) fn end_of_stream(ends: SocketPair) -> Seen {
    let SocketPair { client, server, .. } = ends;
    let sleeper = Sleeper::default();
    let reader = || {
        call("receiving", || read_exact(&client, &mut [0; 8]))?;
        sleeper.about_to_sleep();
        ended(&client)
    };
    let closer = || {
        call("sending", || write_all(&server, b"greeting"))?;
        sleeper.sleeps()?;
        drop(server);
        Ok(())
    };
    both(reader, closer)?;
    Ok("seen by the sleeping reader".to_owned())
}

/// A thread sleeps in `recv` while another shuts down the sending direction. The reply arrives afterwards.
pub(super) fn shutdown_elsewhere(ends: SocketPair) -> Seen {
    /// Time for a reader that is woken wrongly to return.
    const STILL: Duration = Duration::from_millis(200);
    let SocketPair { client, server, .. } = &ends;
    let sleeper = &Sleeper::default();
    let (woken, wait) = std::sync::mpsc::sync_channel(1);
    let reader = move || {
        let mut got = [0; 6];
        sleeper.about_to_sleep();
        let read = call("sleeping in recv while another thread shut the write side down", || {
            read_exact(client, &mut got)
        });
        // The send fails if the other thread has stopped waiting, which is the expected case.
        let _others_went_on = woken.try_send(());
        read?;
        expect(&got == b"answer", || "the reply differs from what was sent".to_owned())
    };
    let others = move || {
        call("sending", || write_all(client, b"question"))?;
        sleeper.sleeps()?;
        call("shutting down", || client.shutdown(Shutdown::Write))?;
        call("receiving", || read_exact(server, &mut [0; 8]))?;
        ended(server)?;
        // If the reader has returned, its own result says why.
        let _still_asleep = wait.recv_timeout(STILL);
        call("answering", || write_all(server, b"answer"))
    };
    both(reader, others)?;
    Ok("the reply arrived afterwards".to_owned())
}

/// One end is closed with a reset while the other sleeps in `recv`.
pub(super) fn reset(ends: SocketPair) -> Seen {
    let SocketPair { client, server, .. } = ends;
    let sleeper = Sleeper::default();
    let reader = || {
        call("receiving", || read_exact(&client, &mut [0; 8]))?;
        sleeper.about_to_sleep();
        match read(&client, &mut [0]) {
            Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(()),
            Err(error) => Err(Fault::Wrong(format!("recv failed with {error} instead of a reset"))),
            Ok(read) => Err(Fault::Wrong(format!("recv returned {read} bytes instead of a reset"))),
        }
    };
    let closer = || {
        call("sending", || write_all(&server, b"greeting"))?;
        sleeper.sleeps()?;
        call("setting SO_LINGER", || rustix::net::sockopt::set_socket_linger(&server, Some(Duration::ZERO)))?;
        drop(server);
        Ok(())
    };
    both(reader, closer)?;
    Ok("seen by the sleeping reader".to_owned())
}

/// One end is closed with unread bytes. The other must learn of it by a reset, as with TCP, or by the end of the
/// stream.
pub(super) fn close_unread(ends: SocketPair) -> Seen {
    let SocketPair { client, server, .. } = ends;
    call("sending", || write_all(&client, &[1; 100]))?;
    let pending = rustix::event::PollFlags::IN;
    expect(super::ends::ready(&server, pending, PATIENCE)?, || "100 bytes did not arrive".to_owned())?;
    drop(server);
    match read(&client, &mut [0]) {
        Ok(0) => Ok("seen as the end of the stream".to_owned()),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok("seen as a reset".to_owned()),
        other => Err(Fault::Wrong(format!("recv returned {other:?} instead of the end"))),
    }
}
