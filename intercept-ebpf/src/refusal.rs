//! Refusing: with an error that says why, and for a connection that is on its way already.

use aya_ebpf::{
    EbpfContext as _,
    bindings::bpf_sock,
    helpers::generated::{bpf_set_retval, bpf_setsockopt},
    programs::SockOpsContext,
};
use intercept_common::{
    failure::{Failure, OnFailure},
    layout::PodPolicy,
};

use crate::{connect::Outcome, context, observe};

/// 1 where the kernel has `bpf_set_retval` (Linux 5.18); the agent fills it in. Without it the error is EPERM.
#[unsafe(no_mangle)]
static HAS_SET_RETVAL: u32 = 0;

const ENOMEM: i32 = 12;
const EPROTONOSUPPORT: i32 = 93;
const ENOBUFS: i32 = 105;

/// Count a failure, and refuse the system call if its policy says so; otherwise what is given.
#[inline(always)]
pub(crate) fn connect(pod: &PodPolicy, failure: Failure, otherwise: Outcome) -> Outcome {
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
        // SAFETY: takes a number. The kernel takes it in place of EPERM when the program refuses.
        let _known_number = unsafe { bpf_set_retval(-error) };
    }
    Outcome::Refuse
}

const SOL_SOCKET: i32 = 1;
const SO_BINDTOIFINDEX: i32 = 62;
/// No interface has this index.
const NOWHERE: u32 = i32::MAX as u32;

/// Keep a SYN from leaving. The callback before it cannot fail the connect(), but the kernel looks for the route once more
/// after it, and there is none by an interface that does not exist: EHOSTUNREACH (tcp_connect; Linux 6.0, before which
/// the option is not one of a program's). The socket stays so: only a privileged process may choose another interface.
#[inline(always)]
pub(crate) fn bar(ctx: &SockOpsContext, sk: *mut bpf_sock) {
    if context::device(sk) != 0 {
        // Loopback is not reached by a device.
        return;
    }
    let mut index = NOWHERE;
    // SAFETY: the context is the running program's, the value as long as said.
    let _refused = unsafe {
        let value = (&raw mut index).cast();
        bpf_setsockopt(ctx.as_ptr(), SOL_SOCKET, SO_BINDTOIFINDEX, value, size_of::<u32>() as i32)
    };
}
