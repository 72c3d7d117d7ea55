//! `connect()`: makes the decision, stores the original destination and redirects the socket to the proxy.
//!
//! A redirected TCP socket is not bound. Its destination becomes 127.0.0.1, ::1 or a stand-in address, so the kernel selects
//! a loopback source. The source that it would have had is stored with the original destination and returned by
//! `getsockname()` and `getpeername()` (`original.rs`). So a socket that fails to connect or disconnects keeps nothing of the
//! redirect, and one source port serves any number of destinations.

use aya_ebpf::programs::SockAddrContext;
use intercept_common::{
    Addr, Family, NetnsCookie, ProxyListener, StandIn, Verdict,
    decide::{OutboundFlow, TproxyMark},
    failure::{Failure, OnFailure},
    layout::{PodPolicy, ProxyPort, SocketState, bound, policy, socket},
};

use crate::{
    container,
    context::{self, AddressFamily, Sock, TCP, UDP},
    maps, observe, open, owner,
    proxy::ProxyState,
    refusal, shadow,
    storage::{StoredServers, StoredSocket},
    verdict,
};

/// What the kernel does with the system call.
#[must_use = "the hook must return it to the kernel"]
#[derive(Clone, Copy)]
pub(crate) enum SyscallVerdict {
    /// It goes on, with the address in the context.
    Proceed,
    /// It fails.
    Refuse,
}

/// Runs in `connect()`. Removes the state of an earlier `connect()` first.
///
/// TCP and UDP share one decision with little code after it, because the verifier walks that code once for each row.
#[inline(always)]
pub(crate) fn connect<F: AddressFamily>(ctx: &SockAddrContext) -> SyscallVerdict {
    let protocol = context::protocol(ctx);
    if protocol != TCP && protocol != UDP {
        return SyscallVerdict::Proceed;
    }
    let netns = maps::netns_cookie(ctx);
    let Some(pod) = maps::pod(netns) else { return SyscallVerdict::Proceed };
    let sk = Sock::of_call(ctx);
    if protocol == TCP {
        StoredSocket::delete(sk);
    } else {
        release_datagram::<F>(ctx, sk);
        if !wants_datagram(pod, context::named_port(ctx)) {
            return SyscallVerdict::Proceed;
        }
    }
    let src = F::bound(sk);
    context::name_own_host::<F>(ctx, src);
    let flow = OutboundFlow {
        protocol: protocol as u16,
        dst: F::named(ctx),
        dst_port: context::named_port(ctx),
        src,
        owner: owner::of(sk.as_ptr(), protocol),
        mark: sk.mark(),
        container: container::of_current(pod),
    };
    let decided = verdict::outbound(pod, &flow);
    observe::outbound(netns, pod, &flow, decided.reason);
    if shadow::is_of(pod) {
        shadow::decided(ctx, &flow, decided);
        return SyscallVerdict::Proceed;
    }
    let state = SocketState {
        addr: flow.dst,
        source: if flow.src.is_unspecified() { decided.source } else { Addr::UNSPECIFIED },
        port: flow.dst_port,
        kind: socket::REDIRECTED,
        slot: pod.slot.0 as u16,
        bound: 0,
        proxy_port: 0,
        proxy_role: 0,
    };
    match decided.reason.verdict() {
        Verdict::Redirect(target) if protocol == TCP => stream::<F>(ctx, netns, pod, state, target),
        Verdict::Redirect(target) => datagram::<F>(ctx, netns, pod, state, target),
        Verdict::Pass if matches!(decided.mark, TproxyMark::Steered) => {
            remember(ctx, netns, pod, SocketState { kind: socket::STEERED, ..state })
        }
        Verdict::Pass if matches!(decided.mark, TproxyMark::Bypass) => {
            remember(ctx, netns, pod, SocketState { kind: socket::BYPASS, ..state })
        }
        Verdict::Pass => SyscallVerdict::Proceed,
    }
}

/// Redirects a TCP socket to the proxy.
#[inline(always)]
fn stream<F: AddressFamily>(
    ctx: &SockAddrContext,
    netns: NetnsCookie,
    pod: &PodPolicy,
    state: SocketState,
    target: ProxyListener,
) -> SyscallVerdict {
    let (role, port) = (target_role(target), target_port(pod, target));
    if open::passes(ctx, pod, TCP, localhost::<F>(state.addr), port) {
        return SyscallVerdict::Proceed;
    }
    if has_too_many(pod) {
        return refusal::connect(pod, Failure::TooManyConnections, SyscallVerdict::Proceed);
    }
    let state = SocketState { proxy_port: port, proxy_role: role as u16, ..state };
    let Some(kept) = StoredSocket::set(Sock::of_call(ctx), state) else { return no_storage(ctx, netns, pod) };
    // The verifier knows nothing about a value read from a map, so it walks the rest once rather than once for each row.
    let kept = kept.read();
    F::rename(ctx, stand_in::<F>(pod, &kept));
    context::rename_port(ctx, kept.proxy_port);
    SyscallVerdict::Proceed
}

/// Redirects a UDP socket to the proxy. A query carries no address by which the source could be restored later, so the
/// socket is bound to the source that it would have had. `bound` records that for the next `connect()`, which undoes it.
#[inline(always)]
fn datagram<F: AddressFamily>(
    ctx: &SockAddrContext,
    netns: NetnsCookie,
    pod: &PodPolicy,
    mut state: SocketState,
    target: ProxyListener,
) -> SyscallVerdict {
    let port = target_port(pod, target);
    let addr = localhost::<F>(state.addr);
    if open::passes(ctx, pod, UDP, addr, port) {
        return SyscallVerdict::Proceed;
    }
    let sk = Sock::of_call(ctx);
    state.kind = socket::DATAGRAM;
    if !state.source.is_unspecified() {
        if F::bind(ctx, state.source) {
            state.bound = 1;
            state.source = Addr::UNSPECIFIED;
        } else {
            // The socket's port is bound without an address, or the source is a link-local one: getsockname() corrects
            // the name.
            observe::failure(pod, Failure::SourceNotBound);
            if matches!(Failure::SourceNotBound.policy(), OnFailure::Closed) {
                return SyscallVerdict::Refuse;
            }
        }
    }
    if let Some(before) = StoredSocket::of(sk) {
        state.bound |= before.bound();
    }
    if StoredSocket::set(sk, state).is_none() {
        return no_storage(ctx, netns, pod);
    }
    F::rename(ctx, addr);
    context::rename_port(ctx, port);
    SyscallVerdict::Proceed
}

/// Undoes what an earlier `connect()` did to a UDP socket.
#[inline(always)]
fn release_datagram<F: AddressFamily>(ctx: &SockAddrContext, sk: Sock) {
    let Some(before) = StoredSocket::of(sk) else { return };
    StoredServers::delete(sk);
    if before.bound() == 0 {
        StoredSocket::delete(sk);
        return;
    }
    before.set_idle();
    // Fails while the socket is connected: without capture, the kernel keeps the source as well.
    let _released = F::bind(ctx, Addr::UNSPECIFIED);
}

/// TPROXY: stores the state of a socket until its SYN is sent. Its destination is not changed.
#[inline(always)]
fn remember(
    ctx: &SockAddrContext,
    netns: NetnsCookie,
    pod: &PodPolicy,
    state: SocketState,
) -> SyscallVerdict {
    if has_too_many(pod) {
        return refusal::connect(pod, Failure::TooManyConnections, SyscallVerdict::Proceed);
    }
    match StoredSocket::set(Sock::of_call(ctx), state) {
        Some(_) => SyscallVerdict::Proceed,
        None => no_storage(ctx, netns, pod),
    }
}

#[inline(always)]
fn no_storage(ctx: &SockAddrContext, netns: NetnsCookie, pod: &PodPolicy) -> SyscallVerdict {
    observe::line!(
        ctx,
        netns,
        "remembering an original destination of netns {}: no memory, the connect is refused"
    );
    refusal::connect(pod, Failure::NoStorage, SyscallVerdict::Proceed)
}

/// Whether the pod has used its budget of entries in ORIG_DST.
#[inline(always)]
fn has_too_many(pod: &PodPolicy) -> bool {
    ProxyState::of(pod.slot).is_some_and(|proxy| proxy.connections() >= pod.max_connections.into())
}

/// Whether a datagram to this port may be a captured query. Other datagrams need no decision.
#[inline(always)]
pub(crate) fn wants_datagram(pod: &PodPolicy, dst_port: u16) -> bool {
    pod.flags & (policy::DNS | policy::SHADOW) != 0 && dst_port == 53
}

/// The proxy's port for a verdict.
#[inline(always)]
pub(crate) fn target_port(pod: &PodPolicy, target: ProxyListener) -> u16 {
    match target {
        ProxyListener::Outbound => pod.outbound_port,
        ProxyListener::Inbound => pod.inbound_port,
        ProxyListener::Dns => pod.dns_port,
    }
}

/// 127.0.0.1 or ::1, by the family of a destination.
#[inline(always)]
fn localhost<F: AddressFamily>(dst: Addr) -> Addr {
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

/// The address of the proxy for a redirected connection: a stand-in address, if it is local in the namespace and a listener
/// that accepts it is known; else 127.0.0.1 or ::1.
#[inline(always)]
fn stand_in<F: AddressFamily>(pod: &PodPolicy, kept: &SocketState) -> Addr {
    let (family, local) = if F::V6 && !kept.addr.is_v4() {
        (Family::V6, policy::STAND_IN_V6)
    } else {
        (Family::V4, policy::STAND_IN_V4)
    };
    let bound = match ProxyState::of(pod.slot) {
        Some(proxy) if pod.flags & local != 0 => proxy.takes(ProxyPort::of(kept.proxy_role), family),
        _ => bound::UNKNOWN,
    };
    match bound {
        bound::WILDCARD => Addr::stand_in(StandIn::Direct, kept.addr, kept.port),
        bound::STEERED => Addr::stand_in(StandIn::Steered, kept.addr, kept.port),
        _ => localhost::<F>(kept.addr),
    }
}
