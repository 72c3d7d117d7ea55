//! Checks of what waits to be read: how much of it there may be, and what the kernel says about it.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::TcpStream,
    os::fd::AsRawFd as _,
    time::{Duration, Instant},
};

use rustix::event::PollFlags;

use super::ends::{Ends, Fault, PATIENCE, PIECE, Seen, both, call, compare, expect, ready, stream};

/// Plain TCP stops at about 4 MB with the kernel's default buffers; this is also all the memory that the check takes.
const LIMIT: usize = 16 << 20;

/// A sender whom nobody reads from must stop, and go on when somebody does.
pub(super) fn slow_reader(ends: Ends) -> Seen {
    /// A socket that takes nothing for so long has stopped.
    const STOPPED: Duration = Duration::from_millis(300);
    call("making the socket non-blocking", || ends.client.set_nonblocking(true))?;
    let piece = stream(8, 0, 4 * PIECE);
    let mut taken = 0;
    loop {
        // Positions count from the start of the piece that is sent over and over.
        match (&ends.client).write(&piece[taken % piece.len()..]) {
            Ok(written) => taken += written,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if !ready(&ends.client, PollFlags::OUT, STOPPED)? {
                    break;
                }
            }
            Err(error) => {
                return Err(Fault::Wrong(format!("sending failed after {}: {error}", mib(taken))));
            }
        }
        expect(taken < LIMIT, || format!("still sending after {} that nobody read", mib(taken)))?;
    }
    // Now somebody reads: all of it, and the sender must be told that there is room.
    let told = || {
        expect(ready(&ends.client, PollFlags::OUT, PATIENCE)?, || {
            format!("stopped at {} and was not woken when the reader went on", mib(taken))
        })
    };
    both(|| read_repeated(&ends.server, &piece, taken), told)?;
    Ok(format!("the sender stopped at {} and went on when it was read", mib(taken)))
}

fn read_repeated(mut end: &TcpStream, piece: &[u8], length: usize) -> Result<(), Fault> {
    let (mut got, mut buffer) = (0, vec![0; piece.len()]);
    while got < length {
        let at = got % piece.len();
        let most = (piece.len() - at).min(length - got);
        let read = call("receiving", || end.read(&mut buffer[..most]))?;
        expect(read > 0, || format!("the stream ended after {got} of {length} bytes"))?;
        compare(8, at, &buffer[..read])?;
        got += read;
    }
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "to be read")]
fn mib(bytes: usize) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// SO_RCVLOWAT: a reader who wants so many bytes is not told of fewer.
pub(super) fn low_water(ends: Ends) -> Seen {
    const WANTED: i32 = 1000;
    call("setting SO_RCVLOWAT", || set_low_water(&ends.server, WANTED))?;
    call("sending", || (&ends.client).write_all(&[1; 100]))?;
    arrived(&ends.server, 100)?;
    expect(!ready(&ends.server, PollFlags::IN, Duration::ZERO)?, || {
        format!("reported as readable with 100 bytes of the {WANTED} that were asked for")
    })?;
    call("sending", || (&ends.client).write_all(&[1; 900]))?;
    expect(ready(&ends.server, PollFlags::IN, PATIENCE)?, || {
        format!("not reported as readable with all {WANTED} bytes there")
    })?;
    Ok(format!("readable at {WANTED} bytes and not before"))
}

/// FIONREAD: how many bytes there are to be read.
pub(super) fn pending_bytes(ends: Ends) -> Seen {
    for sent in [1_u64, 1000] {
        call("sending", || (&ends.client).write_all(&vec![1; usize::try_from(sent).unwrap_or_default()]))?;
    }
    arrived(&ends.server, 1001)?;
    let told = call("asking by FIONREAD", || rustix::io::ioctl_fionread(&ends.server))?;
    expect(told == 1001, || format!("told {told} of 1001 bytes"))?;
    call("receiving", || (&ends.server).read_exact(&mut [0; 501]))?;
    let told = call("asking by FIONREAD", || rustix::io::ioctl_fionread(&ends.server))?;
    expect(told == 500, || format!("told {told} of 500 bytes"))?;
    Ok("told all bytes, and what was left of them".to_owned())
}

/// Returns when so many bytes can be peeked at.
fn arrived(end: &TcpStream, wanted: usize) -> Result<(), Fault> {
    call("making the socket non-blocking", || end.set_nonblocking(true))?;
    let (deadline, mut buffer) = (Instant::now() + PATIENCE, vec![0; wanted]);
    loop {
        match end.peek(&mut buffer) {
            Ok(there) if there == wanted => break,
            Err(error) if error.kind() != ErrorKind::WouldBlock => {
                return Err(Fault::Call { what: "peeking", error, after: Duration::ZERO });
            }
            seen if Instant::now() > deadline => {
                return Err(Fault::Wrong(format!("peeking at {wanted} bytes gave {seen:?}")));
            }
            _ => std::thread::yield_now(),
        }
    }
    call("making the socket block", || end.set_nonblocking(false))
}

fn set_low_water(end: &TcpStream, bytes: libc::c_int) -> std::io::Result<()> {
    const LENGTH: libc::socklen_t = 4;
    const _: () = assert!(size_of::<libc::c_int>() == LENGTH as usize);
    // SAFETY: the kernel reads one int, which outlives the call.
    let result = unsafe {
        libc::setsockopt(
            end.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVLOWAT,
            (&raw const bytes).cast(),
            LENGTH,
        )
    };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}
