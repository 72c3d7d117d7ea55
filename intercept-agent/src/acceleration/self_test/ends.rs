//! A connection of the self-test and the operations of its checks. Each waits at most [`PATIENCE`] for the kernel.

use std::{
    io::{self, IoSlice, Read as _, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::fd::AsFd,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicI32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use aya::maps::{Array, MapData};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Longer than anything on one machine takes. What has not arrived by then never will.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// Length of a read or write in checks that are not about lengths.
pub(super) const PIECE: usize = 16 << 10;

/// The observation of a check, or its failure.
pub(super) type Seen = Result<String, Fault>;

/// A failure on a connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    /// A system call failed.
    #[error("{what}: {error}{}", waited(*after))]
    Call { what: &'static str, error: io::Error, after: Duration },
    /// A system call succeeded that should have failed, or had another result.
    #[error("{0}")]
    Wrong(String),
}

/// The time that a failed call took: EAGAIN from a blocking socket is a timeout if it comes after the time limit, and a
/// fault if it comes before.
fn waited(after: Duration) -> String {
    match after >= PATIENCE / 2 {
        true => format!(" (timed out after {} s)", PATIENCE.as_secs()),
        false => " (without waiting)".to_owned(),
    }
}

/// Makes a call and records how long it took if it failed.
pub(super) fn call<T, E: Into<io::Error>>(
    what: &'static str,
    call: impl FnOnce() -> Result<T, E>,
) -> Result<T, Fault> {
    let start = Instant::now();
    call().map_err(|error| Fault::Call { what, error: error.into(), after: start.elapsed() })
}

/// Fails with `otherwise` unless `holds`.
pub(super) fn expect(holds: bool, otherwise: impl FnOnce() -> String) -> Result<(), Fault> {
    if holds { Ok(()) } else { Err(Fault::Wrong(otherwise())) }
}

/// Both ends of a TCP connection over the loopback interface of the thread's namespace.
pub(super) struct SocketPair {
    pub(super) client: TcpStream,
    pub(super) server: TcpStream,
    /// Sends the following messages by TCP although the connection is joined, or joins them again. No effect on a plain
    /// connection.
    pub(super) latch: Latch,
}

/// The type of [`SocketPair::latch`].
#[derive(Clone, Default)]
pub(super) struct Latch(pub(super) Option<Arc<Mutex<Array<MapData, u32>>>>);

/// How the self-test's program sends messages.
#[derive(Clone, Copy)]
#[repr(u32)]
pub(super) enum SendPath {
    Joined = 0,
    Tcp = 1,
}

impl Latch {
    pub(super) fn set(&self, path: SendPath) -> Result<(), Fault> {
        let Some(cell) = &self.0 else { return Ok(()) };
        let mut cell = cell.lock().unwrap_or_else(PoisonError::into_inner);
        call("setting the self-test's latch", || cell.set(0, path as u32, 0).map_err(io::Error::other))
    }
}

/// How a check uses descriptors.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Descriptors {
    /// As proxies do, which sleep only in epoll or poll.
    NonBlocking,
    /// As many applications do.
    Blocking,
}

impl SocketPair {
    /// Opens a connection. Both ends time out after [`PATIENCE`].
    pub(super) fn connect(descriptors: Descriptors) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let client = TcpStream::connect_timeout(&listener.local_addr()?, PATIENCE)?;
        // Established, because the connect above succeeded.
        let (server, _) = listener.accept()?;
        for end in [&client, &server] {
            end.set_read_timeout(Some(PATIENCE))?;
            end.set_write_timeout(Some(PATIENCE))?;
            end.set_nodelay(true)?;
            end.set_nonblocking(descriptors == Descriptors::NonBlocking)?;
        }
        Ok(Self { client, server, latch: Latch::default() })
    }
}

/// Reads available bytes and waits for them as the descriptor does: a blocking one in the call, so that EAGAIN is a
/// fault.
pub(super) fn read(mut end: &TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
    by_descriptor(end, PollFlags::IN, || end.read(buffer))
}

/// Writes as many bytes as fit and waits for space as `read` waits for bytes.
pub(super) fn write(mut end: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
    by_descriptor(end, PollFlags::OUT, || end.write(bytes))
}

/// Fills the buffer.
pub(super) fn read_exact(end: &TcpStream, buffer: &mut [u8]) -> io::Result<()> {
    let mut got = 0;
    while got < buffer.len() {
        match read(end, &mut buffer[got..])? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            some => got += some,
        }
    }
    Ok(())
}

/// Writes all bytes.
pub(super) fn write_all(end: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let written = write(end, bytes)?;
        bytes = &bytes[written..];
    }
    Ok(())
}

/// Waits until a non-blocking descriptor is ready for the call.
pub(super) fn by_descriptor<T>(
    end: &TcpStream,
    what: PollFlags,
    mut call: impl FnMut() -> io::Result<T>,
) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let waits = rustix::fs::fcntl_getfl(end)?.contains(rustix::fs::OFlags::NONBLOCK);
                let within = Timespec { tv_sec: PATIENCE.as_secs().cast_signed(), tv_nsec: 0 };
                if !waits || poll(&mut [PollFd::new(end, what)], Some(&within))? == 0 {
                    return Err(error);
                }
            }
            done => return done,
        }
    }
}

/// Returns the byte at offset `at` of a stream in which lost, repeated and moved bytes are detected.
fn byte(seed: u64, at: u64) -> u8 {
    let word = (at / 8 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(seed);
    word.to_le_bytes()[usize::try_from(at % 8).unwrap_or_default()]
}

/// Returns odd lengths from one byte to [`PIECE`].
pub(super) fn odd_sizes() -> impl Iterator<Item = usize> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // Each order of magnitude is equally likely.
        let most = 16_u64 << (state % 11);
        usize::try_from((state >> 32) % most).unwrap_or_default() | 1
    })
}

/// Returns `length` bytes of a stream, from offset `from`.
pub(super) fn stream(seed: u64, from: usize, length: usize) -> Vec<u8> {
    (from..from + length).map(|at| byte(seed, at as u64)).collect()
}

/// Compares bytes received with the stream.
pub(super) fn compare(seed: u64, from: usize, piece: &[u8]) -> Result<(), Fault> {
    match piece.iter().enumerate().find(|(at, got)| byte(seed, (from + at) as u64) != **got) {
        None => Ok(()),
        Some((at, _)) => {
            Err(Fault::Wrong(format!("a byte differs from the one sent at offset {}", from + at)))
        }
    }
}

/// Writes bytes of a stream in pieces of these lengths, every third with one vectored call.
pub(super) fn send(
    mut end: &TcpStream,
    seed: u64,
    length: usize,
    mut sizes: impl Iterator<Item = usize>,
) -> Result<(), Fault> {
    let (mut sent, mut turn) = (0, 0_usize);
    let mut piece = Vec::new();
    while sent < length {
        if piece.is_empty() {
            let size = sizes.next().unwrap_or(PIECE).clamp(1, length - sent);
            piece = stream(seed, sent, size);
        }
        turn += 1;
        let written = call("sending", || match turn.is_multiple_of(3) {
            true => {
                let (one, other) = piece.split_at(piece.len() / 2);
                by_descriptor(end, PollFlags::OUT, || {
                    end.write_vectored(&[IoSlice::new(one), IoSlice::new(other)])
                })
            }
            false => write(end, &piece),
        })?;
        expect(written > 0, || "sending returned 0 bytes".to_owned())?;
        piece.drain(..written);
        sent += written;
    }
    Ok(())
}

/// Reads bytes of a stream and compares them.
pub(super) fn receive(
    end: &TcpStream,
    seed: u64,
    length: usize,
    mut sizes: impl Iterator<Item = usize>,
) -> Result<(), Fault> {
    let mut got = 0;
    let mut buffer = vec![0; 2 * PIECE];
    while got < length {
        let size = sizes.next().unwrap_or(PIECE).clamp(1, length - got).min(buffer.len());
        let some = call("receiving", || read(end, &mut buffer[..size]))?;
        expect(some > 0, || format!("the stream ended after {got} of {length} bytes"))?;
        compare(seed, got, &buffer[..some])?;
        got += some;
    }
    Ok(())
}

/// Expects the end of the stream.
pub(super) fn ended(end: &TcpStream) -> Result<(), Fault> {
    let more = call("waiting for the end of the stream", || read(end, &mut [0; 64]))?;
    expect(more == 0, || format!("{more} bytes after the end of the stream"))
}

/// Runs both at the same time. Returns the first failure.
pub(super) fn both(
    one: impl FnOnce() -> Result<(), Fault> + Send,
    other: impl FnOnce() -> Result<(), Fault> + Send,
) -> Result<(), Fault> {
    thread::scope(|scope| {
        let thread = scope.spawn(other);
        let one = one();
        let other = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        one.and(other)
    })
}

/// Whether the socket becomes ready for `what` within the time.
pub(super) fn ready(end: impl AsFd, what: PollFlags, within: Duration) -> Result<bool, Fault> {
    let within = Timespec { tv_sec: within.as_secs().cast_signed(), tv_nsec: within.subsec_nanos().into() };
    let found = call("polling", || poll(&mut [PollFd::new(&end, what)], Some(&within)))?;
    Ok(found > 0)
}

/// Lets a thread announce a blocking call, so that another acts only while it sleeps.
#[derive(Default)]
pub(super) struct Sleeper(AtomicI32);

impl Sleeper {
    /// Announces that this thread's next call blocks.
    pub(super) fn about_to_sleep(&self) {
        self.0.store(rustix::thread::gettid().as_raw_nonzero().get(), Ordering::Release);
    }

    /// Waits until the announced thread sleeps, as the kernel shows its state.
    pub(super) fn sleeps(&self) -> Result<(), Fault> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            let thread = self.0.load(Ordering::Acquire);
            let path = format!("/proc/self/task/{thread}/stat");
            // "TID (NAME) S ..."
            let stat = std::fs::read_to_string(path).unwrap_or_default();
            if thread != 0 && stat.rsplit_once(") ").is_some_and(|(_, state)| state.starts_with('S')) {
                self.0.store(0, Ordering::Release);
                return Ok(());
            }
            thread::yield_now();
        }
        Err(Fault::Wrong("a thread that should sleep did not".to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lost_doubled_or_moved_is_found() {
        let sent = stream(1, 0, 4096);
        compare(1, 0, &sent).expect("as it was sent");
        compare(1, 1000, &sent[1000..]).expect("as it was sent");
        assert!(compare(2, 0, &sent).is_err(), "of another stream");
        for by in [1, 7, 8, 64, 1024] {
            assert!(compare(1, by, &sent).is_err(), "doubled {by} bytes");
            assert!(compare(1, 0, &sent[by..]).is_err(), "lost {by} bytes");
        }
        let moved = [&sent[1024..2048], &sent[..1024]].concat();
        assert!(compare(1, 0, &moved).is_err());
    }

    #[test]
    fn sizes_are_odd_and_of_all_magnitudes() {
        let sizes: Vec<_> = odd_sizes().take(1000).collect();
        assert!(sizes.iter().all(|size| size % 2 == 1 && *size <= PIECE));
        assert!(sizes.iter().any(|size| *size < 8) && sizes.iter().any(|size| *size > PIECE / 2));
    }
}
