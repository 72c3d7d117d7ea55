//! Refusing a flow: a system call with a telling errno, and a connection whose SYN is about to be sent.

use aya_ebpf::{
    EbpfContext as _,
    helpers::generated::{bpf_set_retval, bpf_setsockopt},
    programs::SockOpsContext,
};
use intercept_common::{
    failure::{Failure, OnFailure},
    layout::PodPolicy,
};

use crate::{connect::SyscallVerdict, context::Sock, observe};

/// 1 if the kernel has `bpf_set_retval` (Linux 5.18). The agent fills it in. Without it the errno is EPERM.
#[unsafe(no_mangle)]
static HAS_SET_RETVAL: u32 = 0;

const ENOMEM: i32 = 12;
const EPROTONOSUPPORT: i32 = 93;
const ENOBUFS: i32 = 105;

/// Counts a failure and refuses the system call, unless the policy of the failure is open.
#[inline(always)]
pub(crate) fn connect(pod: &PodPolicy, failure: Failure, otherwise: SyscallVerdict) -> SyscallVerdict {
    observe::failure(pod, failure);
    if matches!(failure.policy(), OnFailure::Open) {
        return otherwise;
    }
    let error = match failure {
        Failure::NoStorage => ENOMEM,
        Failure::TooManyConnections => ENOBUFS,
        Failure::MptcpRefused => EPROTONOSUPPORT,
        _ => 0,
    };
    // SAFETY: reads a static; volatile because the loader replaces its value.
    if error != 0 && unsafe { core::ptr::read_volatile(&raw const HAS_SET_RETVAL) } != 0 {
        // SAFETY: takes a number, which the kernel returns in place of EPERM.
        let _known_number = unsafe { bpf_set_retval(-error) };
    }
    SyscallVerdict::Refuse
}

const SOL_SOCKET: i32 = 1;
const SO_BINDTOIFINDEX: i32 = 62;
/// No interface has this index.
const NOWHERE: u32 = i32::MAX as u32;

/// Keeps a SYN from being sent. The callback before it cannot fail `connect()`, but the kernel looks up the route again after
/// it (tcp_connect), and there is none through an interface that does not exist: EHOSTUNREACH. Programs can set the option
/// since Linux 6.0. The socket stays unusable: only a privileged process may choose another interface.
#[inline(always)]
pub(crate) fn bar(ctx: &SockOpsContext, sk: Sock) {
    if sk.device() != 0 {
        // Bound to an interface, it has no route to loopback anyway.
        return;
    }
    let mut index = NOWHERE;
    // SAFETY: the context is that of the running program, and the length is that of the value.
    let _refused = unsafe {
        let value = (&raw mut index).cast();
        bpf_setsockopt(ctx.as_ptr(), SOL_SOCKET, SO_BINDTOIFINDEX, value, size_of::<u32>() as i32)
    };
}
