//! `--open-without-proxy`: flows pass while the proxy does not listen. Other pods pay only for the test of a flag.

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

/// Whether a flow passes because the pod is open and nothing listens on the proxy's port.
#[inline(always)]
pub(crate) fn passes(ctx: &SockAddrContext, pod: &PodPolicy, protocol: u32, proxy: Addr, port: u16) -> bool {
    if pod.flags & policy::OPEN_WITHOUT_PROXY == 0 || listens(ctx, protocol, proxy, port) {
        return false;
    }
    observe::failure(pod, Failure::NoListener);
    true
}

/// Whether a socket of the namespace would receive what is sent to an address.
#[inline(always)]
fn listens(ctx: &SockAddrContext, protocol: u32, addr: Addr, port: u16) -> bool {
    // Source port 0 matches no connected socket, only listeners and unconnected ones.
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
    // SAFETY: the context is that of the running program, the tuple is initialised and `len` bytes long, and the reference
    // to the socket is released.
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
