//! A socket on its way to another process.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use tests::unusual::UnusualSocket;

/// Starts a process of `used_by` and gives it the socket; it says what came of it.
pub(crate) fn to_receiver(unusual: &UnusualSocket, socket: &OwnedFd) -> Result<()> {
    let (ours, theirs) = UnixStream::pair()?;
    let mut receiver = Command::new(std::env::current_exe()?)
        .arg(serde_json::to_string(unusual)?)
        .arg(crate::RECEIVER)
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .gid(unusual.used_by.gid)
        .uid(unusual.used_by.uid)
        .spawn()
        .context("starting the receiver")?;
    let fds = [socket.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    ensure!(control.push(SendAncillaryMessage::ScmRights(&fds)), "no room for a descriptor");
    sendmsg(&ours, &[IoSlice::new(b"x")], &mut control, SendFlags::empty()).context("passing the socket")?;
    let status = receiver.wait()?;
    ensure!(status.success(), "the receiver: {status}");
    Ok(())
}

/// The socket that comes by standard input.
pub(crate) fn receive() -> Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(io::stdin(), &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::empty())
        .context("receiving a socket")?;
    let passed = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    passed.context("a message without a socket")
}
