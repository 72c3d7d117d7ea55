//! Checks of unread bytes: how many there can be, and how the kernel accounts for them.

use std::{
    io::{ErrorKind, Write as _},
    net::TcpStream,
    os::fd::AsRawFd as _,
    time::{Duration, Instant},
};

use rustix::event::PollFlags;

use super::ends::{
    Fault, PATIENCE, PIECE, Seen, SocketPair, both, call, compare, expect, read, read_exact, ready, stream,
    write_all,
};

/// Plain TCP stops at about 4 MB with default buffers. This is also the most memory that the check uses.
const LIMIT: usize = 16 << 20;

/// A sender without a reader must stop, and continue when the reader does.
pub(super) fn slow_reader(ends: SocketPair) -> Seen {
    /// A socket that accepts no bytes for this long has stopped.
    const STOPPED: Duration = Duration::from_millis(300);
    call("setting the socket non-blocking", || ends.client.set_nonblocking(true))?;
    let piece = stream(8, 0, 4 * PIECE);
    let mut taken = 0;
    loop {
        // Offsets count from the start of the piece, which is sent repeatedly.
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
        expect(taken < LIMIT, || format!("still sending after {} that were not read", mib(taken)))?;
    }
    // Read everything. The sender must be woken.
    let told = || {
        expect(ready(&ends.client, PollFlags::OUT, PATIENCE)?, || {
            format!("stopped at {} and was not woken when the reader continued", mib(taken))
        })
    };
    both(|| read_repeated(&ends.server, &piece, taken), told)?;
    Ok(format!("the sender stopped at {} and continued when they were read", mib(taken)))
}

fn read_repeated(end: &TcpStream, piece: &[u8], length: usize) -> Result<(), Fault> {
    let (mut got, mut buffer) = (0, vec![0; piece.len()]);
    while got < length {
        let at = got % piece.len();
        let most = (piece.len() - at).min(length - got);
        let some = call("receiving", || read(end, &mut buffer[..most]))?;
        expect(some > 0, || format!("the stream ended after {got} of {length} bytes"))?;
        compare(8, at, &buffer[..some])?;
        got += some;
    }
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "to be read")]
fn mib(bytes: usize) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// A reader with SO_RCVLOWAT is not woken by fewer bytes.
pub(super) fn low_water(ends: SocketPair) -> Seen {
    const WANTED: i32 = 1000;
    call("setting SO_RCVLOWAT", || set_low_water(&ends.server, WANTED))?;
    call("sending", || write_all(&ends.client, &[1; 100]))?;
    arrived(&ends.server, 100)?;
    expect(!ready(&ends.server, PollFlags::IN, Duration::ZERO)?, || {
        format!("reported as readable with 100 bytes of the {WANTED} that were asked for")
    })?;
    call("sending", || write_all(&ends.client, &[1; 900]))?;
    expect(ready(&ends.server, PollFlags::IN, PATIENCE)?, || {
        format!("not reported as readable with all {WANTED} bytes there")
    })?;
    Ok(format!("readable at {WANTED} bytes and not before"))
}

/// FIONREAD returns the number of unread bytes.
pub(super) fn pending_bytes(ends: SocketPair) -> Seen {
    for sent in [1_u64, 1000] {
        call("sending", || write_all(&ends.client, &vec![1; usize::try_from(sent).unwrap_or_default()]))?;
    }
    arrived(&ends.server, 1001)?;
    let told = call("reading FIONREAD", || rustix::io::ioctl_fionread(&ends.server))?;
    expect(told == 1001, || format!("FIONREAD returned {told} for 1001 bytes"))?;
    call("receiving", || read_exact(&ends.server, &mut [0; 501]))?;
    let told = call("reading FIONREAD", || rustix::io::ioctl_fionread(&ends.server))?;
    expect(told == 500, || format!("FIONREAD returned {told} for 500 bytes"))?;
    Ok("FIONREAD returned all bytes, and then the remaining ones".to_owned())
}

/// Joined messages are charged to the reader's socket, which the programs rely on for their limits. Linux 6.1.122,
/// 6.6.66, 6.12.2, 6.13 and later do so.
pub(super) fn charged(ends: SocketPair) -> Seen {
    const SENT: u32 = 3000;
    call("sending", || write_all(&ends.client, &[1; SENT as usize]))?;
    arrived(&ends.server, SENT as usize)?;
    let charged = call("reading SO_MEMINFO", || receive_memory(&ends.server))?;
    expect(charged >= SENT, || format!("{charged} of {SENT} unread bytes are charged to the socket"))?;
    call("receiving", || read_exact(&ends.server, &mut [0; SENT as usize]))?;
    let charged = call("reading SO_MEMINFO", || receive_memory(&ends.server))?;
    expect(charged == 0, || format!("{charged} bytes are charged to the socket after all were read"))?;
    Ok(format!("{SENT} unread bytes are charged, and released when they are read"))
}

/// Returns `SK_MEMINFO_RMEM_ALLOC`.
fn receive_memory(end: &TcpStream) -> std::io::Result<u32> {
    const SO_MEMINFO: libc::c_int = 55;
    let mut values = [0u32; 9];
    let mut length = libc::socklen_t::try_from(size_of_val(&values)).map_err(std::io::Error::other)?;
    // SAFETY: the kernel writes at most `length` bytes into an array that outlives the call.
    let result = unsafe {
        libc::getsockopt(
            end.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_MEMINFO,
            values.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(values[0]) } else { Err(std::io::Error::last_os_error()) }
}

/// Waits until this many bytes can be peeked at.
fn arrived(end: &TcpStream, wanted: usize) -> Result<(), Fault> {
    let before = call("reading the flags of the descriptor", || rustix::fs::fcntl_getfl(end))?;
    let blocks = !before.contains(rustix::fs::OFlags::NONBLOCK);
    call("setting the socket non-blocking", || end.set_nonblocking(true))?;
    let (deadline, mut buffer) = (Instant::now() + PATIENCE, vec![0; wanted]);
    loop {
        match end.peek(&mut buffer) {
            Ok(there) if there == wanted => break,
            Err(error) if error.kind() != ErrorKind::WouldBlock => {
                return Err(Fault::Call { what: "peeking", error, after: Duration::ZERO });
            }
            seen if Instant::now() > deadline => {
                return Err(Fault::Wrong(format!("peeking at {wanted} bytes returned {seen:?}")));
            }
            _ => std::thread::yield_now(),
        }
    }
    call("restoring the flags of the descriptor", || end.set_nonblocking(!blocks))
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
