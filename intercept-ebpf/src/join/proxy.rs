//! Whether a socket belongs to an accepted proxy: created by an owner of `-u` or `-g`, in the proxy's container where that
//! counts, with an executable of the pod's list.
//! Called in the system calls connect() and listen(), where the running task is the proxy.

use aya_ebpf::{bindings::bpf_sock, programs::SockOpsContext};
use intercept_common::{
    acceleration::{JoinCount, PodCell, ProxyName},
    layout::{MAX_OWNERS, PodPolicy},
};

use crate::{
    container,
    context::{self, TCP},
    kernel, maps,
    observe::{self, Side},
    owner,
};

/// The pod of a callback, if it is accelerated.
#[inline(always)]
pub(crate) fn pod(ctx: &SockOpsContext) -> Option<(PodCell, &'static PodPolicy)> {
    let netns = maps::netns_cookie(ctx);
    let policy = maps::policy(netns)?;
    let pod = PodCell { netns, slot: policy.slot, reserved: 0 };
    maps::is_on(&pod).then_some((pod, policy))
}

/// Whether the socket has one of the proxy's owners.
#[inline(always)]
pub(crate) fn owns(policy: &PodPolicy, sk: *mut bpf_sock) -> bool {
    let owner = owner::of(sk, TCP);
    is_listed(&policy.uids, policy.uid_count, owner.uid)
        || is_listed(&policy.gids, policy.gid_count, owner.gid)
}

/// Whether the running task is an accepted proxy of the pod, for a socket of its owner.
#[inline(always)]
pub(crate) fn made(
    ctx: &SockOpsContext,
    sk: *mut bpf_sock,
    pod: &PodCell,
    policy: &PodPolicy,
    side: Side,
) -> bool {
    if !container::made_socket(policy, sk) {
        return false;
    }
    let name = ProxyName { netns: pod.netns, name: kernel::executable() };
    let known = maps::is_known(&name);
    if !known {
        let mut beginning = observe::NO_NAME;
        let length = beginning.len();
        beginning.copy_from_slice(&name.name[..length]);
        let ends = context::callback_ends(ctx.ops);
        observe::connection(pod, &ends, side, JoinCount::RefusedProxy, beginning);
    }
    known
}

#[inline(always)]
fn is_listed(ids: &[u32; MAX_OWNERS], count: u16, id: u32) -> bool {
    // Unused elements repeat the first.
    count != 0 && ids.contains(&id)
}
