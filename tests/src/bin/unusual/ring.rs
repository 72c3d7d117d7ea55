//! Connecting by an io_uring.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::{IoUring, opcode, types};
use socket2::SockAddr;

pub(crate) fn connect(socket: BorrowedFd<'_>, to: &SockAddr) -> io::Result<()> {
    let mut ring = IoUring::new(1)?;
    let entry = opcode::Connect::new(types::Fd(socket.as_raw_fd()), to.as_ptr().cast(), to.len()).build();
    // SAFETY: the address and the descriptor outlive the operation, which is awaited here.
    unsafe { ring.submission().push(&entry) }.map_err(io::Error::other)?;
    ring.submit_and_wait(1)?;
    let done = ring.completion().next().ok_or_else(|| io::Error::other("no completion"))?;
    if done.result() < 0 { Err(io::Error::from_raw_os_error(-done.result())) } else { Ok(()) }
}
