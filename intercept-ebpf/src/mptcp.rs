//! MPTCP sockets. A sockmap cannot hold their listeners (EOPNOTSUPP on Linux 6.18), so `sk_lookup` cannot assign connections
//! to them.

use aya_ebpf::{bindings::bpf_sock, helpers::bpf_get_current_uid_gid, programs::SockContext};
use intercept_common::{
    failure::Failure,
    layout::{PodPolicy, policy},
};

use crate::{
    connect::SyscallVerdict,
    container,
    context::{MPTCP, load},
    maps, refusal, shadow, workload,
};

/// Whether inbound connections are captured by the listening sockets of applications, which must be in a sockmap then.
#[inline(always)]
fn tells_applications(pod: &PodPolicy) -> bool {
    pod.flags & policy::BY_LISTENER != 0 && pod.flags & (policy::INBOUND_ALL | policy::INBOUND_PORTS) != 0
}

/// Runs in `socket()`. Refuses MPTCP sockets to the proxy: runtimes that prefer MPTCP, such as Go's, then use TCP.
#[inline(always)]
pub(crate) fn create(ctx: &SockContext) -> SyscallVerdict {
    if load!(load_u32, bpf_sock, ctx.sock, protocol) != MPTCP {
        return SyscallVerdict::Proceed;
    }
    let Some(pod) = maps::pod(maps::netns_cookie(ctx)).filter(|pod| !shadow::is_of(pod)) else {
        return SyscallVerdict::Proceed;
    };
    if !workload::is_set() || !tells_applications(pod) {
        let ids = bpf_get_current_uid_gid();
        if !pod.is_proxy(ids as u32, (ids >> 32) as u32) || !pod.may_be_proxy(container::of_current(pod)) {
            return SyscallVerdict::Proceed;
        }
    }
    refusal::connect(pod, Failure::MptcpRefused, SyscallVerdict::Proceed)
}
