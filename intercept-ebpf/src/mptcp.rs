//! Sockets of MPTCP. The kernel takes their listeners into no map of sockets (EOPNOTSUPP on 6.18), so that connections
//! could not be handed to them.

use aya_ebpf::{bindings::bpf_sock, helpers::bpf_get_current_uid_gid, programs::SockContext};
use intercept_common::failure::Failure;

use crate::{
    connect::Outcome,
    context::{MPTCP, load},
    maps, refusal,
};

/// A socket is being made. One of MPTCP is refused to the proxy: runtimes that prefer it, as Go's does, then use TCP.
#[inline(always)]
pub(crate) fn create(ctx: &SockContext) -> Outcome {
    if load!(load_u32, bpf_sock, ctx.sock, protocol) != MPTCP {
        return Outcome::Proceed;
    }
    let Some(pod) = maps::pod(maps::netns_cookie(ctx)) else { return Outcome::Proceed };
    let ids = bpf_get_current_uid_gid();
    if !pod.is_proxy(ids as u32, (ids >> 32) as u32) {
        return Outcome::Proceed;
    }
    refusal::connect(pod, Failure::MptcpRefused, Outcome::Proceed)
}
