//! Datagrams of DNS: `sendmsg()` to a captured server goes to the proxy, and `recvmsg()` names the server that was
//! asked as the sender of the answer.
//!
//! Of a socket that asks one server, which is nearly every one, the server is remembered and that is all. When it asks
//! another, the answers must be told apart, and of an answer `recvmsg()` shows the sender only. So a query to a further
//! server is given a source that carries a number; the proxy answers to there; and its answer, a `sendmsg()` in the
//! same pod, is made to come from there as well.

use aya_ebpf::{bindings::bpf_sock, programs::SockAddrContext};
use intercept_common::{
    Addr, Verdict,
    decide::{OutboundFlow, decide_outbound},
    failure::Failure,
    layout::{PodPolicy, SocketState, policy, socket},
};

use crate::{
    connect::{Outcome, target_port, wants_datagram},
    context::{self, Family, UDP},
    lookup::PolicyMaps,
    maps, observe, open, owner, refusal,
};

/// A datagram is being sent to an address.
#[inline(always)]
pub(crate) fn sendmsg<F: Family>(ctx: &SockAddrContext) -> Outcome {
    let dst_port = context::named_port(ctx);
    let netns = maps::netns_cookie(ctx);
    let Some(pod) = maps::pod(netns) else { return Outcome::Proceed };
    if !wants_datagram(pod, dst_port) {
        answer::<F>(ctx, pod);
        return Outcome::Proceed;
    }
    let sk = context::sock(ctx);
    let bound = F::bound(sk);
    let asked = F::datagram_source(ctx);
    let src = if asked.is_unspecified() { bound } else { asked };
    context::name_own_host::<F>(ctx, src);
    let flow = OutboundFlow {
        protocol: UDP as u8,
        dst: F::named(ctx),
        dst_port,
        src,
        owner: owner::of(sk, UDP),
        // Connections only are told by it.
        mark: 0,
    };
    let decided = decide_outbound(pod, &flow, &PolicyMaps { conn: None });
    observe::outbound(netns, pod, &flow, decided.decision.reason);
    let target = match decided.decision.verdict {
        Verdict::Pass => return Outcome::Proceed,
        Verdict::Redirect(target) => target,
    };
    let (addr, port) = (flow.dst.localhost(), target_port(pod, target));
    if open::passes(ctx, pod, UDP, addr, port) {
        return Outcome::Proceed;
    }
    let source = if flow.src.is_unspecified() { decided.source } else { Addr::UNSPECIFIED };
    let Some(source) = remember(sk, pod, &flow, source) else {
        observe::line!(ctx, netns, "remembering a DNS server of netns {}: no memory, the query is refused");
        return refusal::connect(pod, Failure::NoStorage, Outcome::Proceed);
    };
    if !source.is_unspecified() {
        F::set_datagram_source(ctx, source);
    }
    F::rename(ctx, addr);
    context::rename_port(ctx, port);
    Outcome::Proceed
}

/// Remember which server is asked; the source for the query, unspecified for what the socket has. None if there is no
/// memory.
#[inline(always)]
fn remember(sk: *mut bpf_sock, pod: &PodPolicy, flow: &OutboundFlow, source: Addr) -> Option<Addr> {
    let mut bound = 0;
    if let Some(before) = maps::socket(sk) {
        bound = before.bound;
    }
    let can_number = !flow.dst.is_v4() || pod.flags & policy::NUMBERED_V4 != 0;
    if let Some(first) = maps::socket(sk)
        && first.kind == socket::DATAGRAM
    {
        if first.addr == flow.dst {
            return Some(source);
        }
        // To a socket that is bound to an address nothing else can be answered: there the server asked last counts.
        // Unless it is connected, when an answer of another server must not reach it, and from a number it does not.
        if can_number && (flow.src.is_unspecified() || context::is_connected(sk)) {
            let servers = maps::servers_to_fill(sk)?;
            let number = match servers.number_of(flow.dst) {
                Some(number) => number,
                None => servers.add(flow.dst),
            };
            return Some(Addr::numbered(flow.dst.is_v4(), number));
        }
    }
    let state = SocketState {
        addr: flow.dst,
        source: Addr::UNSPECIFIED,
        port: flow.dst_port,
        kind: socket::DATAGRAM,
        slot: pod.slot as u16,
        bound,
        proxy_port: pod.dns_port,
        proxy_role: 0,
    };
    maps::set_socket(sk, state)?;
    Some(source)
}

/// A datagram to anywhere else; if it is the proxy's answer to a number, it comes from there.
#[inline(always)]
fn answer<F: Family>(ctx: &SockAddrContext, pod: &PodPolicy) {
    let dst = F::named(ctx);
    if dst.number().is_none() || context::bound_port(context::sock(ctx)) != pod.dns_port {
        return;
    }
    F::set_datagram_source(ctx, dst);
    if F::V6 {
        // IPv4 is at home on all of 127/8. This address is nowhere, but nobody asks whether a source is one's own.
        F::rename(ctx, Addr::LOCALHOST_V6);
    }
}

/// A datagram is being received: `ctx` names its sender.
#[inline(always)]
pub(crate) fn recvmsg<F: Family>(ctx: &SockAddrContext) {
    let sender = F::named(ctx);
    let number = sender.number();
    if number.is_none() && !sender.is_loopback() {
        return;
    }
    let sk = context::sock(ctx);
    let Some(first) = maps::socket(sk) else { return };
    let Some(pod) = maps::pod(maps::netns_cookie(ctx)) else { return };
    if first.kind != socket::DATAGRAM || context::named_port(ctx) != pod.dns_port {
        return;
    }
    let server = match number {
        None => Some(first.addr),
        Some(number) => maps::servers(sk).and_then(|servers| servers.server(number)),
    };
    if let Some(server) = server
        && server.is_v4() == sender.is_v4()
    {
        F::rename(ctx, server);
        context::rename_port(ctx, first.port);
    }
}
