//! `connect()`: decide, remember what was dialled, and dial the proxy instead.
//!
//! A redirected TCP socket is not bound. It dials 127.0.0.1, ::1 or a stand-in address, so that the kernel gives it a
//! loopback source; the source that it would have had is kept with the original destination, and shown where somebody
//! asks for it (`original.rs`). So nothing of the redirect stays on a socket that fails to connect or is disconnected,
//! and one source port serves for any number of destinations.

use aya_ebpf::{bindings::bpf_sock, programs::SockAddrContext};
use intercept_common::{
    Addr, ProxyListener, StandIn, Verdict,
    decide::{OutboundFlow, decide_outbound},
    failure::{Failure, OnFailure},
    layout::{PodPolicy, ProxyPort, SocketState, bound, policy, socket},
};

use crate::{
    context::{self, Family, TCP, UDP},
    lookup::PolicyMaps,
    maps, observe, open, owner,
    proxy::ProxyState,
    refusal,
};

/// What the hook tells the kernel.
#[derive(Clone, Copy)]
pub(crate) enum Outcome {
    /// Go on, with what may have been rewritten.
    Proceed,
    /// Fail the system call.
    Refuse,
}

/// A socket is being connected. Whatever an earlier connect() left is gone before this one is decided on.
///
/// There is one decision for streams and datagrams, and little after it, because the verifier walks what follows once for
/// each row.
#[inline(always)]
pub(crate) fn connect<F: Family>(ctx: &SockAddrContext) -> Outcome {
    let protocol = context::protocol(ctx);
    if protocol != TCP && protocol != UDP {
        return Outcome::Proceed;
    }
    let netns = maps::netns_cookie(ctx);
    let Some(pod) = maps::pod(netns) else { return Outcome::Proceed };
    let sk = context::sock(ctx);
    if protocol == TCP {
        maps::forget_socket(sk);
    } else {
        release_datagram::<F>(ctx, sk);
        if !wants_datagram(pod, context::named_port(ctx)) {
            return Outcome::Proceed;
        }
    }
    let src = F::bound(sk);
    context::name_own_host::<F>(ctx, src);
    let flow = OutboundFlow {
        protocol: protocol as u8,
        dst: F::named(ctx),
        dst_port: context::named_port(ctx),
        src,
        owner: owner::of(sk, protocol),
        mark: context::mark(sk),
    };
    let decided = decide_outbound(pod, &flow, &PolicyMaps { conn: None });
    observe::outbound(netns, pod, &flow, decided.decision.reason);
    let state = SocketState {
        addr: flow.dst,
        source: if flow.src.is_unspecified() { decided.source } else { Addr::UNSPECIFIED },
        port: flow.dst_port,
        kind: socket::REDIRECTED,
        slot: pod.slot as u16,
        bound: 0,
        proxy_port: 0,
        proxy_role: 0,
    };
    match decided.decision.verdict {
        Verdict::Redirect(target) if protocol == TCP => stream::<F>(ctx, netns, pod, state, target),
        Verdict::Redirect(target) => datagram::<F>(ctx, netns, pod, state, target),
        Verdict::Pass if decided.mark => {
            remember(ctx, netns, pod, SocketState { kind: socket::STEERED, ..state })
        }
        Verdict::Pass if decided.bypass => {
            remember(ctx, netns, pod, SocketState { kind: socket::BYPASS, ..state })
        }
        Verdict::Pass => Outcome::Proceed,
    }
}

/// A TCP connection goes to the proxy.
#[inline(always)]
fn stream<F: Family>(
    ctx: &SockAddrContext,
    netns: u64,
    pod: &PodPolicy,
    state: SocketState,
    target: ProxyListener,
) -> Outcome {
    let (role, port) = (target_role(target), target_port(pod, target));
    if open::passes(ctx, pod, TCP, localhost::<F>(state.addr), port) {
        return Outcome::Proceed;
    }
    if has_too_many(pod) {
        return refusal::connect(pod, Failure::TooManyConnections, Outcome::Proceed);
    }
    let state = SocketState { proxy_port: port, proxy_role: role as u16, ..state };
    let Some(kept) = maps::set_socket(context::sock(ctx), state) else { return no_storage(ctx, netns, pod) };
    // Read back, the verifier knows nothing of it: what follows is walked once, rather than once for each row that leads
    // here.
    let kept = maps::reread(kept);
    F::rename(ctx, stand_in::<F>(pod, &kept));
    context::rename_port(ctx, kept.proxy_port);
    Outcome::Proceed
}

/// A datagram socket is connected to the proxy. Its queries carry no address that could be asked for later, so it is bound
/// to the source that it would have had; a lasting mark of this is what lets a later connect() begin without it.
#[inline(always)]
fn datagram<F: Family>(
    ctx: &SockAddrContext,
    netns: u64,
    pod: &PodPolicy,
    mut state: SocketState,
    target: ProxyListener,
) -> Outcome {
    let port = target_port(pod, target);
    let addr = localhost::<F>(state.addr);
    if open::passes(ctx, pod, UDP, addr, port) {
        return Outcome::Proceed;
    }
    let sk = context::sock(ctx);
    state.kind = socket::DATAGRAM;
    if !state.source.is_unspecified() {
        if F::bind(ctx, state.source) {
            state.bound = 1;
            state.source = Addr::UNSPECIFIED;
        } else {
            // Its port is bound without an address, or the source is a link-local one: the name is put right where it is
            // asked for.
            observe::failure(pod, Failure::SourceNotBound);
            if matches!(Failure::SourceNotBound.policy(), OnFailure::Closed) {
                return Outcome::Refuse;
            }
        }
    }
    if let Some(before) = maps::socket(sk) {
        state.bound |= before.bound;
    }
    if maps::set_socket(sk, state).is_none() {
        return no_storage(ctx, netns, pod);
    }
    F::rename(ctx, addr);
    context::rename_port(ctx, port);
    Outcome::Proceed
}

/// Undo what an earlier connect() did to a datagram socket.
#[inline(always)]
fn release_datagram<F: Family>(ctx: &SockAddrContext, sk: *mut bpf_sock) {
    let Some(before) = maps::socket(sk) else { return };
    maps::forget_servers(sk);
    if before.bound == 0 {
        maps::forget_socket(sk);
        return;
    }
    before.kind = socket::IDLE;
    before.source = Addr::UNSPECIFIED;
    // Fails while the socket is still connected: then the kernel keeps the source as well.
    let _released = F::bind(ctx, Addr::UNSPECIFIED);
}

/// TPROXY: keep what is known of a socket until its SYN leaves; it dials what it names.
#[inline(always)]
fn remember(ctx: &SockAddrContext, netns: u64, pod: &PodPolicy, state: SocketState) -> Outcome {
    if has_too_many(pod) {
        return refusal::connect(pod, Failure::TooManyConnections, Outcome::Proceed);
    }
    match maps::set_socket(context::sock(ctx), state) {
        Some(_) => Outcome::Proceed,
        None => no_storage(ctx, netns, pod),
    }
}

#[inline(always)]
fn no_storage(ctx: &SockAddrContext, netns: u64, pod: &PodPolicy) -> Outcome {
    observe::line!(
        ctx,
        netns,
        "remembering an original destination of netns {}: no memory, the connect is refused"
    );
    refusal::connect(pod, Failure::NoStorage, Outcome::Proceed)
}

/// Whether the pod has all the entries of ORIG_DST that it may have.
#[inline(always)]
fn has_too_many(pod: &PodPolicy) -> bool {
    ProxyState::of(pod.slot).is_some_and(|proxy| proxy.connections() >= pod.max_connections.into())
}

/// Whether a datagram to this port can be a captured query: all others go on without a decision.
#[inline(always)]
pub(crate) fn wants_datagram(pod: &PodPolicy, dst_port: u16) -> bool {
    pod.flags & policy::DNS != 0 && dst_port == 53
}

/// The port of the proxy that a flow goes to.
#[inline(always)]
pub(crate) fn target_port(pod: &PodPolicy, target: ProxyListener) -> u16 {
    match target {
        ProxyListener::Outbound => pod.outbound_port,
        ProxyListener::Inbound => pod.inbound_port,
        ProxyListener::Dns => pod.dns_port,
    }
}

/// 127.0.0.1 or ::1, for a destination.
#[inline(always)]
fn localhost<F: Family>(dst: Addr) -> Addr {
    if F::V6 { dst.localhost() } else { Addr::LOCALHOST_V4 }
}

#[inline(always)]
fn target_role(target: ProxyListener) -> ProxyPort {
    match target {
        ProxyListener::Outbound => ProxyPort::Outbound,
        ProxyListener::Inbound => ProxyPort::Inbound,
        ProxyListener::Dns => ProxyPort::Dns,
    }
}

/// The address at which a connection dials the proxy in place of its destination: a stand-in, where the proxy is seen to
/// take it and it is local in the namespace; else 127.0.0.1 or ::1.
#[inline(always)]
fn stand_in<F: Family>(pod: &PodPolicy, kept: &SocketState) -> Addr {
    let v6 = F::V6 && !kept.addr.is_v4();
    let local = if v6 { policy::STAND_IN_V6 } else { policy::STAND_IN_V4 };
    let bound = match ProxyState::of(pod.slot) {
        Some(proxy) if pod.flags & local != 0 => proxy.takes(ProxyPort::of(kept.proxy_role), v6),
        _ => bound::UNKNOWN,
    };
    match bound {
        bound::WILDCARD => Addr::stand_in(StandIn::Direct, kept.addr, kept.port),
        bound::STEERED => Addr::stand_in(StandIn::Steered, kept.addr, kept.port),
        _ => localhost::<F>(kept.addr),
    }
}
