//! Checks of a joined connection that changes to TCP and is joined again after the reader has caught up.

use std::time::Duration;

use rustix::event::{PollFlags, Timespec, epoll};

use super::ends::{
    Fault, PATIENCE, Seen, SendPath, SocketPair, call, compare, expect, read, read_exact, ready, stream,
    write_all,
};

const ROUNDS: usize = 100;
const PIECE: usize = 3001;

/// Joined messages and those sent by TCP arrive in the order in which they were sent.
pub(super) fn there_and_back(ends: SocketPair) -> Seen {
    let (mut at, mut got) = (0, vec![0; 2 * PIECE]);
    for round in 0..ROUNDS {
        // Like the programs: a message is joined only when everything sent by TCP has been read.
        for path in [SendPath::Joined, SendPath::Tcp] {
            ends.latch.set(path)?;
            call("sending", || write_all(&ends.client, &stream(9, at, PIECE)))?;
            at += PIECE;
        }
        let from = at - 2 * PIECE;
        if round % 2 == 0 {
            // Let both arrive, so that one call reads them.
            std::thread::yield_now();
        }
        call("receiving", || read_exact(&ends.server, &mut got))?;
        compare(9, from, &got)?;
    }
    ends.latch.set(SendPath::Joined)?;
    Ok(format!("in order, {ROUNDS} times"))
}

/// A reader in edge-triggered `epoll_wait` is woken by a message sent by TCP on a joined connection.
pub(super) fn edges(ends: SocketPair) -> Seen {
    let epoll = call("creating an epoll instance", || epoll::create(epoll::CreateFlags::CLOEXEC))?;
    let interest = epoll::EventFlags::IN | epoll::EventFlags::ET;
    call("adding to the epoll instance", || {
        epoll::add(&epoll, &ends.server, epoll::EventData::new_u64(0), interest)
    })?;
    for round in 0..ROUNDS {
        ends.latch.set(if round % 2 == 0 { SendPath::Tcp } else { SendPath::Joined })?;
        call("sending", || write_all(&ends.client, &stream(10, round * PIECE, PIECE)))?;
        let mut got = 0;
        while got < PIECE {
            wait(&epoll)?;
            let mut buffer = [0; PIECE];
            // Read until EAGAIN, as edge-triggered readers must.
            while ready(&ends.server, PollFlags::IN, Duration::ZERO)? && got < PIECE {
                let some = call("receiving", || read(&ends.server, &mut buffer[got..]))?;
                expect(some > 0, || "the stream ended".to_owned())?;
                compare(10, round * PIECE + got, &buffer[got..got + some])?;
                got += some;
            }
        }
    }
    ends.latch.set(SendPath::Joined)?;
    Ok(format!("an edge for each of {ROUNDS} messages, every other by TCP"))
}

fn wait(epoll: impl std::os::fd::AsFd) -> Result<(), Fault> {
    let mut events = Vec::with_capacity(4);
    let within = Timespec { tv_sec: PATIENCE.as_secs().cast_signed(), tv_nsec: 0 };
    let found = call("waiting in epoll_wait", || {
        epoll::wait(&epoll, rustix::buffer::spare_capacity(&mut events), Some(&within))
    })?;
    expect(found > 0, || format!("no event in {} s", PATIENCE.as_secs()))
}

/// FIONREAD on a joined connection counts bytes sent by TCP. It does not in Linux 6.6.128, 6.12.75, 6.18.14, 6.19.4 and
/// later, until a change of July 2026. nginx and the runtimes of Java and .NET take a count of 0 for the end of the
/// stream.
pub(super) fn pending_bytes(ends: SocketPair) -> Seen {
    call("sending", || write_all(&ends.client, &[1; 10]))?;
    call("receiving", || read_exact(&ends.server, &mut [0; 10]))?;
    ends.latch.set(SendPath::Tcp)?;
    let sent = call("sending", || write_all(&ends.client, &[1; 1000]));
    ends.latch.set(SendPath::Joined)?;
    sent?;
    expect(ready(&ends.server, PollFlags::IN, PATIENCE)?, || "nothing arrived".to_owned())?;
    let told = call("reading FIONREAD", || rustix::io::ioctl_fionread(&ends.server))?;
    expect(told == 1000, || format!("FIONREAD returned {told} for 1000 bytes"))?;
    Ok("FIONREAD returned all 1000 bytes".to_owned())
}
