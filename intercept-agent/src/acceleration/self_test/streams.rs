//! Checks that all bytes arrive, once and in order, for every way to read and write.

use std::{
    hash::{DefaultHasher, Hasher as _},
    io::{Read as _, Write as _},
    net::{Shutdown, TcpStream},
    os::fd::OwnedFd,
};

use rustix::{
    event::PollFlags,
    fs::{MemfdFlags, memfd_create, sendfile},
    pipe::{PipeFlags, SpliceFlags, pipe_with, splice},
};

use super::ends::{
    Fault, PATIENCE, PIECE, Seen, SocketPair, both, by_descriptor, call, compare, ended, expect, odd_sizes,
    read, read_exact, ready, receive, send, stream, write_all,
};

/// Bytes in one direction, in odd pieces.
const ORDERED: usize = 1 << 20;
/// Bytes in each direction at the same time.
const SUMMED: usize = 4 << 20;
/// Bytes sent or received by calls other than send and recv.
const OTHERWISE: usize = 1 << 20;

/// One direction. The lengths of writes and reads are odd and unrelated.
pub(super) fn order(ends: SocketPair) -> Seen {
    both(
        || send(&ends.client, 3, ORDERED, odd_sizes()),
        || receive(&ends.server, 3, ORDERED, odd_sizes().skip(17)),
    )?;
    Ok(format!("{} MiB in odd pieces", ORDERED >> 20))
}

/// Both directions at the same time, in large pieces. Checksums of sent and received bytes are compared.
pub(super) fn checksums(ends: SocketPair) -> Seen {
    let way = |from: &TcpStream, to: &TcpStream, seed: u64| {
        let (mut sent, mut received) = (0, 0);
        both(
            || {
                sent = summed_send(from, seed)?;
                Ok(())
            },
            || {
                received = summed_receive(to)?;
                Ok(())
            },
        )?;
        expect(sent == received, || "the checksums of what was sent and received differ".to_owned())
    };
    both(|| way(&ends.client, &ends.server, 4), || way(&ends.server, &ends.client, 5))?;
    Ok(format!("{} MiB each way at the same time", SUMMED >> 20))
}

fn summed_send(end: &TcpStream, seed: u64) -> Result<u64, Fault> {
    const LARGE: usize = 256 << 10;
    let mut sum = DefaultHasher::new();
    let mut piece = stream(seed, 0, LARGE);
    for round in 0..SUMMED / LARGE {
        // Makes every piece different.
        piece[..8].copy_from_slice(&(round as u64).to_le_bytes());
        sum.write(&piece);
        call("sending", || write_all(end, &piece))?;
    }
    Ok(sum.finish())
}

fn summed_receive(end: &TcpStream) -> Result<u64, Fault> {
    let mut sum = DefaultHasher::new();
    let (mut buffer, mut got) = (vec![0; 4 * PIECE], 0);
    // The end of the stream belongs to another check.
    while got < SUMMED {
        let most = buffer.len().min(SUMMED - got);
        let some = call("receiving", || read(end, &mut buffer[..most]))?;
        expect(some > 0, || format!("the stream ended after {got} of {SUMMED} bytes"))?;
        sum.write(&buffer[..some]);
        got += some;
    }
    Ok(sum.finish())
}

/// Splices from the socket into a pipe, only while the socket is readable.
pub(super) fn splice_out(ends: SocketPair) -> Seen {
    let (out, into) = call("creating a pipe", || pipe_with(PipeFlags::CLOEXEC))?;
    let mut out = std::fs::File::from(out);
    let reader = || {
        let mut got = 0;
        let mut buffer = vec![0; PIECE];
        while got < OTHERWISE {
            expect(ready(&ends.server, PollFlags::IN, PATIENCE)?, || {
                format!("nothing to read after {got} of {OTHERWISE} bytes")
            })?;
            // At most what a pipe holds, so that the call can only wait for the socket.
            let moved = call("splicing from a socket with data pending", || {
                splice(&ends.server, None, &into, None, PIECE, SpliceFlags::empty())
            })?;
            expect(moved > 0, || format!("the stream ended after {got} of {OTHERWISE} bytes"))?;
            call("reading the pipe", || out.read_exact(&mut buffer[..moved]))?;
            compare(6, got, &buffer[..moved])?;
            got += moved;
        }
        Ok(())
    };
    both(reader, || send(&ends.client, 6, OTHERWISE, std::iter::repeat(PIECE)))?;
    Ok(format!("{} KiB into a pipe", OTHERWISE >> 10))
}

/// Sends a file.
pub(super) fn sendfile_in(ends: SocketPair) -> Seen {
    let file: OwnedFd = call("creating a memory file", || memfd_create("self-test", MemfdFlags::CLOEXEC))?;
    let mut file = std::fs::File::from(file);
    call("writing the file", || file.write_all(&stream(7, 0, OTHERWISE)))?;
    let writer = || {
        let (mut offset, mut left) = (0, OTHERWISE);
        while left > 0 {
            let moved = call("sending the file", || {
                by_descriptor(&ends.client, PollFlags::OUT, || {
                    Ok(sendfile(&ends.client, &file, Some(&mut offset), left)?)
                })
            })?;
            expect(moved > 0, || format!("sendfile stopped after {offset} of {OTHERWISE} bytes"))?;
            left -= moved;
        }
        call("shutting down", || ends.client.shutdown(Shutdown::Write))
    };
    let reader = || {
        receive(&ends.server, 7, OTHERWISE, std::iter::repeat(PIECE))?;
        ended(&ends.server)
    };
    both(writer, reader)?;
    Ok(format!("{} KiB from a file", OTHERWISE >> 10))
}

/// Bytes that were peeked at are read next.
pub(super) fn peek(ends: SocketPair) -> Seen {
    const GREETING: usize = 3000;
    let half = GREETING / 2;
    for round in 0..20 {
        let sent = stream(round, 0, GREETING);
        let mut got = vec![0; GREETING];
        call("sending", || write_all(&ends.client, &sent[..half]))?;
        let peeked =
            call("peeking", || by_descriptor(&ends.server, PollFlags::IN, || ends.server.peek(&mut got)))?;
        compare(round, 0, &got[..peeked])?;
        call("sending", || write_all(&ends.client, &sent[half..]))?;
        let peeked =
            call("peeking", || by_descriptor(&ends.server, PollFlags::IN, || ends.server.peek(&mut got)))?;
        compare(round, 0, &got[..peeked])?;
        call("receiving", || read_exact(&ends.server, &mut got))?;
        compare(round, 0, &got)?;
    }
    Ok("the same bytes were read afterwards".to_owned())
}
