//! DNS over UDP: `sendmsg()` to a captured server is redirected to the proxy, and `recvmsg()` returns the server as the
//! sender of the answer.
//!
//! Nearly every socket asks one server, which is stored with the socket. If a socket asks another server, the answers must
//! be told apart, and the hook in `recvmsg()` sees only the sender. A query to a further server therefore gets a source
//! address that encodes a number. The proxy answers to that address, and its answer, a `sendmsg()` in the same pod, is sent
//! from that address as well.

use aya_ebpf::programs::SockAddrContext;
use intercept_common::{
    Addr, Verdict,
    decide::OutboundFlow,
    failure::Failure,
    layout::{PodPolicy, ServerNumbers as _, SocketState, policy, socket},
};

use crate::{
    connect::{SyscallVerdict, target_port, wants_datagram},
    container,
    context::{self, AddressFamily, Sock, UDP},
    maps, observe, open, owner, refusal, shadow,
    storage::{StoredServers, StoredSocket},
    verdict,
};

/// Runs in `sendmsg()` with an address.
#[inline(always)]
pub(crate) fn sendmsg<F: AddressFamily>(ctx: &SockAddrContext) -> SyscallVerdict {
    let dst_port = context::named_port(ctx);
    let netns = maps::netns_cookie(ctx);
    let Some(pod) = maps::pod(netns) else { return SyscallVerdict::Proceed };
    if !wants_datagram(pod, dst_port) {
        if !shadow::is_of(pod) {
            answer::<F>(ctx, pod);
        }
        return SyscallVerdict::Proceed;
    }
    let sk = Sock::of_call(ctx);
    let bound = F::bound(sk);
    let asked = F::datagram_source(ctx);
    let src = if asked.is_unspecified() { bound } else { asked };
    context::name_own_host::<F>(ctx, src);
    let flow = OutboundFlow {
        protocol: UDP as u16,
        dst: F::named(ctx),
        dst_port,
        src,
        owner: owner::of(sk.as_ptr(), UDP),
        // Only connections are matched by mark.
        mark: 0,
        container: container::of_current(pod),
    };
    let decided = verdict::outbound(pod, &flow);
    observe::outbound(netns, pod, &flow, decided.reason);
    if shadow::is_of(pod) {
        shadow::decided(ctx, &flow, decided);
        return SyscallVerdict::Proceed;
    }
    let target = match decided.reason.verdict() {
        Verdict::Pass => return SyscallVerdict::Proceed,
        Verdict::Redirect(target) => target,
    };
    let (addr, port) = (flow.dst.localhost(), target_port(pod, target));
    if open::passes(ctx, pod, UDP, addr, port) {
        return SyscallVerdict::Proceed;
    }
    let source = if flow.src.is_unspecified() { decided.source } else { Addr::UNSPECIFIED };
    let Some(source) = remember(sk, pod, &flow, source) else {
        observe::line!(ctx, netns, "remembering a DNS server of netns {}: no memory, the query is refused");
        return refusal::connect(pod, Failure::NoStorage, SyscallVerdict::Proceed);
    };
    if !source.is_unspecified() {
        F::set_datagram_source(ctx, source);
    }
    F::rename(ctx, addr);
    context::rename_port(ctx, port);
    SyscallVerdict::Proceed
}

/// Stores the server and returns the source for the query; unspecified keeps the socket's own. `None` if out of memory.
#[inline(always)]
fn remember(sk: Sock, pod: &PodPolicy, flow: &OutboundFlow, source: Addr) -> Option<Addr> {
    let mut bound = 0;
    if let Some(before) = StoredSocket::of(sk) {
        bound = before.bound();
    }
    let can_number = !flow.dst.is_v4() || pod.flags & policy::NUMBERED_V4 != 0;
    if let Some(first) = StoredSocket::of(sk)
        && first.kind() == socket::DATAGRAM
    {
        if first.addr() == flow.dst {
            return Some(source);
        }
        // A socket bound to an address receives answers only there, so the server asked last wins. A connected socket must
        // not receive another server's answer, and a numbered source keeps it away.
        if can_number && (flow.src.is_unspecified() || sk.is_connected()) {
            let mut servers = StoredServers::create(sk)?;
            let number = match servers.number_of(flow.dst) {
                Some(number) => number,
                None => servers.add(flow.dst),
            };
            return Some(Addr::numbered(flow.dst.family(), number));
        }
    }
    let state = SocketState {
        addr: flow.dst,
        source: Addr::UNSPECIFIED,
        port: flow.dst_port,
        kind: socket::DATAGRAM,
        slot: pod.slot.0 as u16,
        bound,
        proxy_port: pod.dns_port,
        proxy_role: 0,
    };
    StoredSocket::set(sk, state)?;
    Some(source)
}

/// Sends the proxy's answer to a numbered source from that address. Other datagrams are not changed.
#[inline(always)]
fn answer<F: AddressFamily>(ctx: &SockAddrContext, pod: &PodPolicy) {
    let dst = F::named(ctx);
    if dst.number().is_none() || Sock::of_call(ctx).bound_port() != pod.dns_port {
        return;
    }
    F::set_datagram_source(ctx, dst);
    if F::V6 {
        // All of 127/8 is local for IPv4. The IPv6 address is not local, but the kernel does not check the source of a
        // datagram on loopback.
        F::rename(ctx, Addr::LOCALHOST_V6);
    }
}

/// Runs in `recvmsg()`; the context has the sender.
#[inline(always)]
pub(crate) fn recvmsg<F: AddressFamily>(ctx: &SockAddrContext) {
    if shadow::is_on() {
        shadow::received::<F>(ctx);
    }
    let sender = F::named(ctx);
    let number = sender.number();
    if number.is_none() && !sender.is_loopback() {
        return;
    }
    let sk = Sock::of_call(ctx);
    let Some(first) = StoredSocket::of(sk) else { return };
    let Some(pod) = maps::pod(maps::netns_cookie(ctx)) else { return };
    if first.kind() != socket::DATAGRAM || context::named_port(ctx) != pod.dns_port {
        return;
    }
    let server = match number {
        None => Some(first.addr()),
        Some(number) => StoredServers::of(sk).and_then(|servers| servers.server(number)),
    };
    if let Some(server) = server
        && server.is_v4() == sender.is_v4()
    {
        F::rename(ctx, server);
        context::rename_port(ctx, first.port());
    }
}
