//! Pods that are to go on without their proxy when it does not listen. Asked for these alone: the others pay for the look
//! at a flag.

use core::{ffi::c_void, mem::size_of};

use aya_ebpf::{
    bindings::{
        bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 as Tuple4,
        bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2 as Tuple6,
    },
    helpers::generated::{bpf_sk_lookup_tcp, bpf_sk_lookup_udp, bpf_sk_release},
    programs::SockAddrContext,
};
use intercept_common::{
    Addr,
    failure::Failure,
    layout::{PodPolicy, policy},
};

use crate::{context::UDP, observe};

/// In the namespace of the context.
const OWN_NETNS: u64 = u64::MAX;

/// Whether a flow is to go where it was going, because its pod is open and nothing listens where it would be sent.
#[inline(always)]
pub(crate) fn passes(ctx: &SockAddrContext, pod: &PodPolicy, protocol: u32, proxy: Addr, port: u16) -> bool {
    if pod.flags & policy::OPEN_WITHOUT_PROXY == 0 || listens(ctx, protocol, proxy, port) {
        return false;
    }
    observe::failure(pod, Failure::NoListener);
    true
}

/// Whether a socket would get what is sent to an address of the namespace.
#[inline(always)]
fn listens(ctx: &SockAddrContext, protocol: u32, addr: Addr, port: u16) -> bool {
    // From the address itself and no port at all, so that only what is not connected is found.
    if addr.is_v4() {
        let mut tuple = Tuple4 { saddr: addr.v4(), daddr: addr.v4(), sport: 0, dport: port.to_be() };
        found(ctx, protocol, (&raw mut tuple).cast(), size_of::<Tuple4>() as u32)
    } else {
        let mut tuple = Tuple6 { saddr: addr.words(), daddr: addr.words(), sport: 0, dport: port.to_be() };
        found(ctx, protocol, (&raw mut tuple).cast(), size_of::<Tuple6>() as u32)
    }
}

#[inline(always)]
fn found(ctx: &SockAddrContext, protocol: u32, tuple: *mut c_void, len: u32) -> bool {
    // SAFETY: the context is the running program's, the tuple as long as said and initialised; what is found is
    // released at once.
    unsafe {
        let sock = if protocol == UDP {
            bpf_sk_lookup_udp(ctx.sock_addr.cast(), tuple.cast(), len, OWN_NETNS, 0)
        } else {
            bpf_sk_lookup_tcp(ctx.sock_addr.cast(), tuple.cast(), len, OWN_NETNS, 0)
        };
        if sock.is_null() {
            return false;
        }
        bpf_sk_release(sock.cast());
    }
    true
}
