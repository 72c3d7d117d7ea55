//! `connect()`: decide, remember what was dialled, and dial the proxy instead.

use core::mem::size_of;

use aya_ebpf::{helpers::generated::bpf_bind, programs::SockAddrContext};
use intercept_common::{
    Addr, Target, Verdict,
    decide::{Outbound, decide_outbound},
    failure::{Failure, OnFailure},
    layout::{PodPolicy, SocketState, policy, socket},
};

use crate::{
    context::{self, AF_INET, AF_INET6, Family, TCP, UDP},
    facts::MapFacts,
    maps, observe, open, owner,
};

/// What the hook tells the kernel.
#[derive(Clone, Copy)]
pub(crate) enum Outcome {
    /// Go on, with what may have been rewritten.
    Proceed,
    /// Fail the system call.
    Refuse,
}

impl From<OnFailure> for Outcome {
    #[inline(always)]
    fn from(policy: OnFailure) -> Self {
        match policy {
            OnFailure::Open => Self::Proceed,
            OnFailure::Closed => Self::Refuse,
        }
    }
}

/// A socket is being connected.
#[inline(always)]
pub(crate) fn connect<F: Family>(ctx: &SockAddrContext) -> Outcome {
    let protocol = context::protocol(ctx);
    if protocol != TCP && protocol != UDP {
        return Outcome::Proceed;
    }
    let netns = maps::netns_cookie(ctx);
    let Some(pod) = maps::pod(netns) else { return Outcome::Proceed };
    let dst_port = context::named_port(ctx);
    if protocol == UDP && !wants_datagram(pod, dst_port) {
        return Outcome::Proceed;
    }
    let sk = context::sock(ctx);
    let flow = Outbound {
        protocol: protocol as u8,
        dst: F::named(ctx),
        dst_port,
        src: F::bound(sk),
        owner: owner::of(sk, protocol),
        mark: context::mark(sk),
    };
    let decided = decide_outbound(pod, &flow, &MapFacts { conn: None });
    observe::outbound(netns, pod, &flow, decided.decision.reason);
    let (addr, port, kind) = match decided.decision.verdict {
        Verdict::Leave if decided.mark => (flow.dst, flow.dst_port, socket::STEERED),
        Verdict::Leave if decided.onward => (flow.dst, flow.dst_port, socket::ONWARD),
        Verdict::Leave => {
            // A datagram socket may have been connected to a captured server before.
            if protocol == UDP {
                maps::forget_socket(sk);
            }
            return Outcome::Proceed;
        }
        Verdict::Redirect(target) => {
            let kind = if protocol == UDP { socket::DATAGRAM } else { socket::REDIRECTED };
            let (mut addr, port) = proxy_addr(pod, target, flow.dst, flow.dst_port);
            if protocol == TCP && !flow.dst.is_v4() && listens_on_any(pod, port, true) {
                addr = own_addr(if flow.src.is_unspecified() { decided.source } else { flow.src });
            }
            if open::passes(ctx, pod, protocol, addr, port) {
                if protocol == UDP {
                    maps::forget_socket(sk);
                }
                return Outcome::Proceed;
            }
            (addr, port, kind)
        }
    };
    let mut state = SocketState { addr: flow.dst, source: Addr::UNSPECIFIED, port: flow.dst_port, kind };
    let mut addr = addr;
    let rewritten = kind == socket::REDIRECTED || kind == socket::DATAGRAM;
    if rewritten
        && flow.src.is_unspecified()
        && !decided.source.is_unspecified()
        && !bind::<F>(ctx, decided.source)
    {
        // The port was bound without an address. The pod's own address leads to a wildcard listener as well, and
        // gives the source that it would have had; else the socket's own name is put right where it is asked for.
        if protocol == TCP && listens_on_any(pod, port, !flow.dst.is_v4()) {
            addr = decided.source;
        } else {
            observe::failure(pod, Failure::SourceNotBound);
            if matches!(Failure::SourceNotBound.policy(), OnFailure::Closed) {
                return Outcome::Refuse;
            }
            state.source = decided.source;
        }
    }
    if maps::set_socket(sk, state).is_none() {
        observe::failure_line!(
            ctx,
            netns,
            pod,
            Failure::NoStorage,
            "remembering an original destination of netns {}: no memory, the connect is refused"
        );
        return Failure::NoStorage.policy().into();
    }
    if !rewritten {
        return Outcome::Proceed;
    }
    F::rename(ctx, addr);
    context::rename_port(ctx, port);
    Outcome::Proceed
}

/// Whether a datagram to this port can be a captured query: all others go on without a decision.
#[inline(always)]
pub(crate) fn wants_datagram(pod: &PodPolicy, dst_port: u16) -> bool {
    pod.flags & policy::DNS != 0 && dst_port == 53
}

/// Where the proxy is dialled in place of a destination.
#[inline(always)]
pub(crate) fn proxy_addr(pod: &PodPolicy, target: Target, dst: Addr, dst_port: u16) -> (Addr, u16) {
    let port = match target {
        Target::Outbound => pod.outbound_port,
        Target::Inbound => pod.inbound_port,
        Target::Dns => pod.dns_port,
    };
    if !dst.is_v4() {
        return (Addr::LOCALHOST_V6, port);
    }
    if listens_on_any(pod, port, false) {
        return (spread(dst, dst_port), port);
    }
    (Addr::LOCALHOST_V4, port)
}

/// The pod's own address, rather than ::1, for a listener that takes both: what the kernel answers without a socket (a
/// reset, the last acknowledgement) does not get from any other address of the pod to ::1, because it is sent by the
/// interface that has the other (tcp_v6_send_response, seen on Linux 6.18). A proxy's socket whose client closed first
/// would stay in LAST-ACK until it gave up, minutes later.
#[inline(always)]
fn own_addr(source: Addr) -> Addr {
    if source.is_unspecified() { Addr::LOCALHOST_V6 } else { source }
}

/// Whether the proxy's listener on this port takes connections to any address.
#[inline(always)]
fn listens_on_any(pod: &PodPolicy, port: u16, v6: bool) -> bool {
    match maps::proxy(pod.slot) {
        // SAFETY: an array element, which is never freed; each half is written whole.
        Some(proxy) => port == pod.outbound_port && unsafe { *proxy }.takes_any(v6),
        None => false,
    }
}

/// An address of 127.128/9 that depends on the destination, so that each destination has the whole range of local
/// ports to itself instead of sharing 28,232 of them with all others.
#[inline(always)]
fn spread(dst: Addr, dst_port: u16) -> Addr {
    // Fibonacci hashing: the upper bits of the product are well mixed.
    let mixed = (dst.v4() ^ u32::from(dst_port).rotate_left(16)).wrapping_mul(0x9e37_79b1);
    Addr::from_v4((0x7f80_0000 | (mixed >> 9)).to_be())
}

#[repr(C)]
struct SockaddrIn {
    family: u16,
    port: u16,
    addr: u32,
    zero: [u32; 2],
}

#[repr(C)]
struct SockaddrIn6 {
    family: u16,
    port: u16,
    flowinfo: u32,
    addr: [u32; 4],
    scope: u32,
}

/// Bind the socket to the source that it would have had, the port still open. Without it the proxy would see
/// 127.0.0.1 as its client, and the client itself as its own address.
#[inline(always)]
fn bind<F: Family>(ctx: &SockAddrContext, source: Addr) -> bool {
    // SAFETY: the address is of the size that is given; the hook is one that may bind.
    let bound = unsafe {
        if F::V6 {
            let mut sockaddr =
                SockaddrIn6 { family: AF_INET6 as u16, port: 0, flowinfo: 0, addr: source.words(), scope: 0 };
            bpf_bind(ctx.sock_addr, (&raw mut sockaddr).cast(), size_of::<SockaddrIn6>() as i32)
        } else {
            let mut sockaddr =
                SockaddrIn { family: AF_INET as u16, port: 0, addr: source.v4(), zero: [0; 2] };
            bpf_bind(ctx.sock_addr, (&raw mut sockaddr).cast(), size_of::<SockaddrIn>() as i32)
        }
    };
    bound == 0
}
