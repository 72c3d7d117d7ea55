//! The workloads of a machine. They share the namespace of the host, so its cookie does not tell them apart. Each has a set of
//! the cgroup programs of its own, with its id as a constant: the id stands in the place of the cookie in every map. Pods
//! share a set in which the constant is zero, so that the verifier removes all of this.

use aya_ebpf::{EbpfContext, helpers::bpf_get_netns_cookie, helpers::generated::bpf_ktime_get_boot_ns};
use intercept_common::{NetnsCookie, layout::PodPolicy};

/// The workload. The agent sets it before it loads the programs.
#[unsafe(no_mangle)]
static WORKLOAD_ID: u64 = 0;
/// Cookie of the host's namespace, for a workload.
#[unsafe(no_mangle)]
static WORKLOAD_NETNS: u64 = 0;

macro_rules! constant {
    ($global:ident) => {
        // SAFETY: reads a static; volatile because the loader replaces its value.
        unsafe { core::ptr::read_volatile(&raw const $global) }
    };
}

/// Whether these are the programs of a workload.
#[inline(always)]
pub(crate) fn is_set() -> bool {
    constant!(WORKLOAD_ID) != 0
}

/// The id of a socket's policy: the workload's, or the cookie of the socket's namespace.
#[inline(always)]
pub(crate) fn policy_key(ctx: &impl EbpfContext) -> NetnsCookie {
    if is_set() {
        return NetnsCookie(constant!(WORKLOAD_ID));
    }
    cookie(ctx)
}

/// Whether a socket is in another namespace than the workload: the cgroups of a machine may have containers below them.
#[inline(always)]
pub(crate) fn is_elsewhere(ctx: &impl EbpfContext) -> bool {
    is_set() && cookie(ctx).0 != constant!(WORKLOAD_NETNS)
}

/// Whether a policy that was to be confirmed was not.
#[inline(always)]
pub(crate) fn is_expired(policy: &PodPolicy) -> bool {
    // SAFETY: the helper has no arguments.
    policy.expires_at != 0 && unsafe { bpf_ktime_get_boot_ns() } >= policy.expires_at
}

#[inline(always)]
fn cookie(ctx: &impl EbpfContext) -> NetnsCookie {
    // SAFETY: the context is that of the running program.
    NetnsCookie(unsafe { bpf_get_netns_cookie(ctx.as_ptr()) })
}
