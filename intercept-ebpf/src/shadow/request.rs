//! The request that a SYN leaves with a listener. It is no full socket, so that callbacks do not give it to programs, but
//! their context begins with its address in the kernel.

use aya_ebpf::{EbpfContext as _, bindings::bpf_sock_ops, programs::SockOpsContext};
use intercept_common::Addr;

use crate::{
    context::{self, AF_INET, AF_INET6, Ends, load},
    owner::follow,
};

macro_rules! offsets {
    ($($name:ident,)*) => {
        $(/// Offset in bytes on the running kernel. The agent fills it in from BTF; zero if there is none.
        #[unsafe(no_mangle)]
        static $name: u32 = 0;)*
    };
}
offsets! { SKC_LISTENER_OFF, SKC_NUM_OFF, SKC_DADDR_OFF, SKC_RCV_SADDR_OFF, RSK_OPS_OFF, RSK_FAMILY_OFF, RCV_ISN_OFF, }

macro_rules! offset {
    ($global:ident) => {
        // SAFETY: reads a static; volatile because the loader replaces its value.
        unsafe { core::ptr::read_volatile(&raw const $global) as usize }
    };
}

/// A SYN that a listener has received.
pub(super) struct SynRequest {
    /// The local end is the address to which the SYN was sent, or rewritten by NAT.
    pub(super) ends: Ends,
    /// Its sequence number.
    pub(super) isn: u32,
    /// Port of the listener, host order.
    pub(super) listener: u16,
}

/// Whether the offsets are known.
#[inline(always)]
pub(super) fn is_readable() -> bool {
    offset!(SKC_LISTENER_OFF) != 0 && offset!(RCV_ISN_OFF) != 0 && offset!(RSK_OPS_OFF) != 0
}

#[inline(always)]
fn is_v4(request: u64) -> bool {
    follow(follow(request, offset!(RSK_OPS_OFF)), offset!(RSK_FAMILY_OFF)) as u32 == AF_INET
}

impl SynRequest {
    #[inline(always)]
    pub(super) fn of(ctx: &SockOpsContext) -> Option<Self> {
        if !is_readable() {
            return None;
        }
        // `sk` is the first member of struct bpf_sock_ops_kern, which the verifier keeps from plain loads.
        let request = follow(ctx.as_ptr() as u64, 0);
        let listener = follow(request, offset!(SKC_LISTENER_OFF));
        if listener == 0 {
            return None;
        }
        let mut ends = context::callback_ends(ctx.ops);
        if load!(load_u32, bpf_sock_ops, ctx.ops, family) == AF_INET6 && is_v4(request) {
            // By a listener for both families; the IPv6 fields of such a request are not filled in.
            ends.remote = Addr::from_v4(follow(request, offset!(SKC_DADDR_OFF)) as u32);
            ends.local = Addr::from_v4(follow(request, offset!(SKC_RCV_SADDR_OFF)) as u32);
        }
        Some(Self {
            ends,
            isn: follow(request, offset!(RCV_ISN_OFF)) as u32,
            listener: follow(listener, offset!(SKC_NUM_OFF)) as u16,
        })
    }
}
