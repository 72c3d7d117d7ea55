//! Simulates a kernel without a hook: a seccomp supervisor answers `bpf()` as that kernel would.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
    thread,
};

use anyhow::{Context, Result, anyhow};
use rustix::event::{PollFd, PollFlags, poll};

/// `BPF_PROG_LOAD`, and where `bpf_attr` has the hook (linux/bpf.h).
const PROG_LOAD: u64 = 5;
const EXPECTED_ATTACH_TYPE: u64 = 68;
/// `SECCOMP_IOCTL_NOTIF_RECV` and `SECCOMP_IOCTL_NOTIF_SEND` (linux/seccomp.h).
const RECEIVE: libc::Ioctl = 0xc050_2100_u32 as libc::Ioctl;
const SEND: libc::Ioctl = 0xc018_2101_u32 as libc::Ioctl;
/// `SECCOMP_USER_NOTIF_FLAG_CONTINUE`: the kernel does the call.
const CONTINUE: u32 = 1;

/// Runs a closure on a thread that, like its children, cannot load programs for this hook (a `BPF_*` of linux/bpf.h).
pub fn with_kernel_without(attach_type: u32, run: impl FnOnce() -> Result<()> + Send) -> Result<()> {
    thread::scope(|scope| {
        let (sender, listener) = std::sync::mpsc::sync_channel(1);
        let watched = scope.spawn(move || {
            let listener = watch_bpf().context("watching bpf() by seccomp")?;
            sender.send(listener).context("handing over the listener")?;
            run()
        });
        if let Ok(listener) = listener.recv() {
            supervise(&listener, attach_type)?;
        }
        watched.join().map_err(|_| anyhow!("what runs on a kernel without a hook panicked"))?
    })
}

/// Makes calls of `bpf()` by this thread and its children wait for an answer of the listener.
fn watch_bpf() -> io::Result<OwnedFd> {
    let statement = |code: u32, k: u32| {
        let code = u16::try_from(code).expect("codes have 16 bits");
        libc::sock_filter { code, jt: 0, jf: 0, k }
    };
    let call = u32::try_from(libc::SYS_bpf).map_err(io::Error::other)?;
    let mut filter = [
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0),
        libc::sock_filter { jf: 1, ..statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, call) },
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_USER_NOTIF),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    let len = u16::try_from(filter.len()).map_err(io::Error::other)?;
    let program = libc::sock_fprog { len, filter: filter.as_mut_ptr() };
    // SAFETY: the filter outlives the call, which copies it.
    let listener = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const program,
        )
    };
    let listener = i32::try_from(listener).map_err(io::Error::other)?;
    if listener < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(listener) })
}

/// Answers every call until no process is left that could make one.
fn supervise(listener: &OwnedFd, attach_type: u32) -> Result<()> {
    loop {
        let mut waiting = [PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN)];
        poll(&mut waiting, None).context("waiting for a call of bpf()")?;
        if !waiting[0].revents().contains(PollFlags::IN) {
            return Ok(());
        }
        // SAFETY: integers only; the kernel wants them to be zero.
        let mut call: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel writes a structure of this size, which is in the number of the request.
        if unsafe { libc::ioctl(listener.as_raw_fd(), RECEIVE, &raw mut call) } < 0 {
            // The caller was killed meanwhile.
            continue;
        }
        let is_refused = is_of(&call, attach_type);
        let mut answer = libc::seccomp_notif_resp {
            id: call.id,
            val: 0,
            error: if is_refused { -libc::EINVAL } else { 0 },
            flags: if is_refused { 0 } else { CONTINUE },
        };
        // SAFETY: as above. It fails if the caller was killed meanwhile.
        let _gone = unsafe { libc::ioctl(listener.as_raw_fd(), SEND, &raw mut answer) };
    }
}

/// Whether the call loads a program of the hook.
fn is_of(call: &libc::seccomp_notif, attach_type: u32) -> bool {
    let [command, attr, size, ..] = call.data.args;
    let mut found = [0u8; 4];
    command == PROG_LOAD
        && size >= EXPECTED_ATTACH_TYPE + 4
        && std::fs::File::open(format!("/proc/{}/mem", call.pid))
            .and_then(|memory| {
                std::os::unix::fs::FileExt::read_exact_at(&memory, &mut found, attr + EXPECTED_ATTACH_TYPE)
            })
            .is_ok()
        && u32::from_ne_bytes(found) == attach_type
}
