//! `connect()`: decide, remember what was dialled, and dial the proxy instead.
//!
//! A redirected TCP socket is not bound. It dials 127.0.0.1, ::1 or a stand-in address, so that the kernel gives it a
//! loopback source; the source that it would have had is kept with the original destination, and shown where somebody
//! asks for it (`original.rs`). So nothing of the redirect stays on a socket that fails to connect or is disconnected,
//! and one source port serves for any number of destinations.

use aya_ebpf::{bindings::bpf_sock, programs::SockAddrContext};
use intercept_common::{
    Addr, Spread, Target, Verdict,
    decide::{Outbound, OutboundDecision, decide_outbound},
    failure::{Failure, OnFailure},
    layout::{PodPolicy, SocketState, bound, policy, socket},
};

use crate::{
    context::{self, Family, TCP, UDP},
    facts::MapFacts,
    maps, observe, open, owner,
    proxy::{ProxyState, listener_bound},
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

/// A socket is being connected.
#[inline(always)]
pub(crate) fn connect<F: Family>(ctx: &SockAddrContext) -> Outcome {
    let protocol = context::protocol(ctx);
    if protocol != TCP && protocol != UDP {
        return Outcome::Proceed;
    }
    let netns = maps::netns_cookie(ctx);
    let Some(pod) = maps::pod(netns) else { return Outcome::Proceed };
    if protocol == TCP { stream::<F>(ctx, netns, pod) } else { datagram::<F>(ctx, netns, pod) }
}

/// A TCP socket. Whatever an earlier connect() left is gone before this one is decided on.
#[inline(always)]
fn stream<F: Family>(ctx: &SockAddrContext, netns: u64, pod: &PodPolicy) -> Outcome {
    let sk = context::sock(ctx);
    maps::forget_socket(sk);
    let (flow, decided) = decide::<F>(ctx, netns, pod, TCP);
    let mut state = SocketState {
        addr: decided.dst,
        source: Addr::UNSPECIFIED,
        port: flow.dst_port,
        kind: socket::REDIRECTED,
        slot: pod.slot as u16,
        bound: 0,
    };
    let target = match decided.decision.verdict {
        Verdict::Redirect(target) => target,
        Verdict::Leave => {
            state.kind = match (decided.mark, decided.onward) {
                (true, _) => socket::STEERED,
                (_, true) => socket::ONWARD,
                _ => return Outcome::Proceed,
            };
            return remember(ctx, netns, pod, sk, state);
        }
    };
    let port = target_port(pod, target);
    let addr = stand_in(pod, port, decided.dst, flow.dst_port);
    if open::passes(ctx, pod, TCP, addr, port) {
        return Outcome::Proceed;
    }
    if flow.src.is_unspecified() {
        state.source = decided.source;
    }
    if let Outcome::Refuse = remember(ctx, netns, pod, sk, state) {
        return Outcome::Refuse;
    }
    dial::<F>(ctx, addr, port)
}

/// A datagram socket. Its queries carry no address that could be asked for later, so it is bound to the source that it
/// would have had; a lasting mark of this is what lets a later connect() begin without it.
#[inline(always)]
fn datagram<F: Family>(ctx: &SockAddrContext, netns: u64, pod: &PodPolicy) -> Outcome {
    let sk = context::sock(ctx);
    let mut state = SocketState {
        addr: Addr::UNSPECIFIED,
        source: Addr::UNSPECIFIED,
        port: 0,
        kind: socket::IDLE,
        slot: pod.slot as u16,
        bound: 0,
    };
    if let Some(before) = maps::socket(sk) {
        state.bound = before.bound;
        if state.bound != 0 {
            // Fails while the socket is still connected: then the kernel keeps the source as well.
            let _released = F::bind(ctx, Addr::UNSPECIFIED);
            *before = state;
        } else {
            maps::forget_socket(sk);
        }
        maps::forget_servers(sk);
    }
    if !wants_datagram(pod, context::named_port(ctx)) {
        return Outcome::Proceed;
    }
    let (flow, decided) = decide::<F>(ctx, netns, pod, UDP);
    let Verdict::Redirect(target) = decided.decision.verdict else { return Outcome::Proceed };
    let (addr, port) = (decided.dst.localhost(), target_port(pod, target));
    if open::passes(ctx, pod, UDP, addr, port) {
        return Outcome::Proceed;
    }
    state.kind = socket::DATAGRAM;
    (state.addr, state.port) = (decided.dst, flow.dst_port);
    if flow.src.is_unspecified() && !decided.source.is_unspecified() {
        if F::bind(ctx, decided.source) {
            state.bound = 1;
        } else {
            // Its port is bound without an address, or the source is a link-local one: the name is put right where it is
            // asked for.
            observe::failure(pod, Failure::SourceNotBound);
            if matches!(Failure::SourceNotBound.policy(), OnFailure::Closed) {
                return Outcome::Refuse;
            }
            state.source = decided.source;
        }
    }
    if let Outcome::Refuse = remember(ctx, netns, pod, sk, state) {
        return Outcome::Refuse;
    }
    dial::<F>(ctx, addr, port)
}

#[inline(always)]
fn decide<F: Family>(
    ctx: &SockAddrContext,
    netns: u64,
    pod: &PodPolicy,
    protocol: u32,
) -> (Outbound, OutboundDecision) {
    let sk = context::sock(ctx);
    let mut flow = Outbound {
        protocol: protocol as u8,
        dst: F::named(ctx),
        dst_port: context::named_port(ctx),
        src: F::bound(sk),
        owner: owner::of(sk, protocol),
        mark: context::mark(sk),
    };
    let decided = decide_outbound(pod, &flow, &MapFacts { conn: None });
    flow.dst = decided.dst;
    observe::outbound(netns, pod, &flow, decided.decision.reason);
    (flow, decided)
}

/// Keep what is known of a socket until its SYN leaves, or as long as it asks by datagrams.
#[inline(always)]
fn remember(
    ctx: &SockAddrContext,
    netns: u64,
    pod: &PodPolicy,
    sk: *mut bpf_sock,
    state: SocketState,
) -> Outcome {
    if state.kind != socket::DATAGRAM && has_too_many(pod) {
        return refusal::connect(pod, Failure::TooManyConnections, Outcome::Proceed);
    }
    if maps::set_socket(sk, state).is_some() {
        return Outcome::Proceed;
    }
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

/// Dial this instead of what the system call names.
#[inline(always)]
fn dial<F: Family>(ctx: &SockAddrContext, addr: Addr, port: u16) -> Outcome {
    F::rename(ctx, addr);
    context::rename_port(ctx, port);
    Outcome::Proceed
}

/// Whether a datagram to this port can be a captured query: all others go on without a decision.
#[inline(always)]
pub(crate) fn wants_datagram(pod: &PodPolicy, dst_port: u16) -> bool {
    pod.flags & policy::DNS != 0 && dst_port == 53
}

/// The port of the proxy that a flow goes to.
#[inline(always)]
pub(crate) fn target_port(pod: &PodPolicy, target: Target) -> u16 {
    match target {
        Target::Outbound => pod.outbound_port,
        Target::Inbound => pod.inbound_port,
        Target::Dns => pod.dns_port,
    }
}

/// The address at which a connection to the proxy's port dials it in place of a destination: a stand-in, where the proxy
/// is seen to take it and it is local in the namespace; else 127.0.0.1 or ::1.
#[inline(always)]
fn stand_in(pod: &PodPolicy, port: u16, dst: Addr, dst_port: u16) -> Addr {
    let local = if dst.is_v4() { policy::SPREAD_V4 } else { policy::SPREAD_V6 };
    if pod.flags & local == 0 {
        return dst.localhost();
    }
    match listener_bound(pod, port, !dst.is_v4()) {
        bound::WILDCARD => Addr::spread(Spread::Direct, dst, dst_port),
        bound::STEERED => Addr::spread(Spread::Steered, dst, dst_port),
        _ => dst.localhost(),
    }
}
