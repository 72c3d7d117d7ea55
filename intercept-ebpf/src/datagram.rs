//! Datagrams of DNS: `sendmsg()` to a captured server goes to the proxy, and `recvmsg()` names the server that was
//! asked as the sender of the answer.

use aya_ebpf::programs::SockAddrContext;
use intercept_common::{
    Addr, Verdict,
    decide::{Outbound, decide_outbound},
    failure::Failure,
    layout::{SocketState, socket},
};

use crate::{
    connect::{Outcome, proxy_addr, wants_datagram},
    context::{self, Family, UDP},
    facts::MapFacts,
    maps, observe, owner,
};

/// A datagram is being sent to an address.
#[inline(always)]
pub(crate) fn sendmsg<F: Family>(ctx: &SockAddrContext) -> Outcome {
    let dst_port = context::named_port(ctx);
    let netns = maps::netns_cookie(ctx);
    let Some(pod) = maps::pod(netns) else { return Outcome::Proceed };
    if !wants_datagram(pod, dst_port) {
        return Outcome::Proceed;
    }
    let sk = context::sock(ctx);
    let bound = F::bound(sk);
    let asked = F::datagram_source(ctx);
    let flow = Outbound {
        protocol: UDP as u8,
        dst: F::named(ctx),
        dst_port,
        src: if asked.is_unspecified() { bound } else { asked },
        owner: owner::of(sk),
    };
    let decided = decide_outbound(pod, &flow, &MapFacts { conn: None });
    observe::outbound(netns, pod, &flow, decided.decision.reason);
    let target = match decided.decision.verdict {
        Verdict::Leave => return Outcome::Proceed,
        Verdict::Redirect(target) => target,
    };
    let state = SocketState {
        addr: flow.dst,
        source: Addr::UNSPECIFIED,
        port: flow.dst_port,
        kind: socket::DATAGRAM,
    };
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
    if flow.src.is_unspecified() && !decided.source.is_unspecified() {
        F::set_datagram_source(ctx, decided.source);
    }
    let (addr, port) = proxy_addr(pod, target, flow.dst, flow.dst_port);
    F::rename(ctx, addr);
    context::rename_port(ctx, port);
    Outcome::Proceed
}

/// A datagram is being received: `ctx` names its sender.
#[inline(always)]
pub(crate) fn recvmsg<F: Family>(ctx: &SockAddrContext) {
    let sender = F::named(ctx);
    if !sender.is_loopback() {
        return;
    }
    let Some(state) = maps::socket(context::sock(ctx)) else { return };
    let Some(pod) = maps::pod(maps::netns_cookie(ctx)) else { return };
    if state.kind == socket::DATAGRAM
        && context::named_port(ctx) == pod.dns_port
        && state.addr.is_v4() == sender.is_v4()
    {
        F::rename(ctx, state.addr);
        context::rename_port(ctx, state.port);
    }
}
