//! Shadow mode: a decision is remembered and compared with what happened to the connection. Nothing is changed, and what
//! cannot be remembered is not compared.
//!
//! A connection of the pod is remembered by the sequence number of its SYN, which NAT does not change. If the SYN reaches
//! a listener of the pod, its request notes there which. The answer to the SYN comes later, so when the client's end is
//! established, it is known whether the proxy has the connection. Where a connection from outside was redirected from is
//! known to conntrack alone; it is compared when the proxy asks for it. A query is compared when its answer is read.

use aya_ebpf::{
    bindings::{bpf_sk_lookup, bpf_sock_ops},
    programs::{SkLookupContext, SockAddrContext, SockOpsContext, SockoptContext},
};
use bytemuck::Zeroable as _;
use intercept_common::{
    Addr, NetnsCookie, ProxyListener, Verdict,
    decide::{OutboundFlow, Owner, TproxyMark},
    layout::{
        ComparedFlow, ConnKey, PodPolicy, ProxyPort, RememberedFlow, ShadowKey, ShadowSocket, destination,
        outcome, policy, remembered,
    },
};

use self::{
    compare::{Verdicts, compare, uncompared},
    request::SynRequest,
};
use crate::{
    context::{self, AddressFamily, Ends, Sock, TCP, UDP, load},
    handshake, maps,
    original::{conntrack_answer, proxy_key},
    verdict::{self, Outbound},
};

mod compare;
mod flows;
mod request;

/// Whether a pod of this node is in shadow mode. Others pay for this test only.
#[inline(always)]
pub(crate) fn is_on() -> bool {
    flows::is_on()
}

/// Whether this pod is.
#[inline(always)]
pub(crate) fn is_of(pod: &PodPolicy) -> bool {
    pod.flags & policy::SHADOW != 0
}

/// The policy of a namespace in shadow mode.
#[inline(always)]
fn pod(netns: NetnsCookie) -> Option<&'static PodPolicy> {
    maps::pod(netns).filter(|pod| is_of(pod))
}

/// Remembers an outbound decision until the SYN leaves, or with the socket of a query.
#[inline(always)]
pub(crate) fn decided(ctx: &SockAddrContext, flow: &OutboundFlow, decided: Outbound) {
    let sk = Sock::of_call(ctx);
    let is_query = u32::from(flow.protocol) == UDP;
    if is_query && flows::socket(sk).is_some_and(|socket| socket.is_waiting != 0) {
        return;
    }
    let expected = match decided.mark {
        TproxyMark::Steered => outcome::INBOUND,
        _ => expected(decided.reason.verdict()),
    };
    let socket = ShadowSocket {
        dst: flow.dst,
        dst_port: flow.dst_port,
        uid: flow.owner.uid,
        gid: flow.owner.gid,
        reason: decided.reason.number(),
        expected,
        ..ShadowSocket::zeroed()
    };
    if !is_query {
        return flows::set_dial(ShadowSocket { cookie: maps::socket_cookie(ctx), ..socket });
    }
    if !flows::set_socket(sk, ShadowSocket { time: compare::now(), is_waiting: 1, ..socket }) {
        uncompared(maps::netns_cookie(ctx));
    }
}

#[inline(always)]
fn expected(verdict: Verdict) -> u8 {
    match verdict {
        Verdict::Pass => outcome::PASSED,
        Verdict::Redirect(ProxyListener::Outbound) => outcome::OUTBOUND,
        Verdict::Redirect(ProxyListener::Inbound) => outcome::INBOUND,
        Verdict::Redirect(ProxyListener::Dns) => outcome::DNS,
    }
}

/// What a connection that reaches a listener on this port has become.
#[inline(always)]
fn outcome_at(pod: &PodPolicy, port: u16) -> u8 {
    match pod.proxy_port(port) {
        Some(ProxyPort::Outbound) => outcome::OUTBOUND,
        Some(ProxyPort::Inbound) => outcome::INBOUND,
        Some(ProxyPort::Dns) => outcome::DNS,
        None => outcome::PASSED,
    }
}

/// A SYN is about to leave.
#[inline(always)]
pub(crate) fn dial(ctx: &SockOpsContext, sk: Sock) {
    let Some(socket) = flows::dialled(maps::socket_cookie(ctx)) else { return };
    if !request::is_readable() {
        return;
    }
    let Some(isn) = handshake::isn(sk) else { return };
    let flow = RememberedFlow {
        dst: socket.dst,
        dst_port: socket.dst_port,
        uid: socket.uid,
        gid: socket.gid,
        reason: socket.reason,
        expected: socket.expected,
        ..RememberedFlow::zeroed()
    };
    flows::insert(&syn_key(maps::netns_cookie(ctx), isn), &flow);
}

#[inline(always)]
fn syn_key(netns: NetnsCookie, isn: u32) -> ShadowKey {
    ShadowKey { netns, addr: Addr::UNSPECIFIED, number: isn, kind: remembered::SYN }
}

/// One port of a client can have connections to several ports at once; NAT keeps those to one port apart.
#[inline(always)]
fn ends_key(netns: NetnsCookie, ends: &Ends) -> ShadowKey {
    let number = u32::from(ends.remote_port) << 16 | u32::from(ends.local_port);
    ShadowKey { netns, addr: ends.remote, number, kind: remembered::ENDS }
}

/// TPROXY looks the proxy's port up, not that of the SYN, so only the client's end counts. Its connections arrive on one
/// interface.
#[inline(always)]
fn arrival_key(netns: NetnsCookie, ends: &Ends) -> ShadowKey {
    ShadowKey { netns, addr: ends.remote, number: ends.remote_port.into(), kind: remembered::ARRIVAL }
}

/// A listener of the pod has received a SYN: the callback is that of the request.
#[inline(always)]
pub(crate) fn received_syn(ctx: &SockOpsContext) {
    let netns = maps::netns_cookie(ctx);
    let Some(pod) = pod(netns) else { return };
    let Some(request) = SynRequest::of(ctx) else { return };
    let key = syn_key(netns, request.isn);
    let flow = flows::change(&key, |flow| {
        flow.local = request.ends.local;
        flow.local_port = request.ends.local_port;
        flow.listener = request.listener;
    });
    let Some(flow) = flow else { return received_from_outside(netns, pod, &request) };
    if outcome_at(pod, request.listener) != outcome::PASSED {
        flows::insert(&ends_key(netns, &request.ends), &flow);
    }
}

#[inline(always)]
fn received_from_outside(netns: NetnsCookie, pod: &PodPolicy, request: &SynRequest) {
    let ends = &request.ends;
    if is_own(pod, ends.remote) {
        // Of a socket that was connected earlier, or was made in another cgroup.
        return uncompared(netns);
    }
    let actual = outcome_at(pod, request.listener);
    if actual != outcome::PASSED && request.listener == ends.local_port {
        // Redirected by NAT: only conntrack knows from where.
        return;
    }
    let Some(ifindex) = ifindex(netns, pod, ends) else { return uncompared(netns) };
    inbound(netns, pod, ends, (ifindex, request.listener));
}

/// Decides on a connection from outside and compares. The local end is the original destination.
#[inline(always)]
fn inbound(netns: NetnsCookie, pod: &PodPolicy, ends: &Ends, (ifindex, listener): (u32, u16)) {
    let conn: ConnKey = proxy_key(netns, ends);
    let reason = verdict::inbound(pod, &conn, ifindex);
    crate::observe::inbound(pod, &conn, reason);
    let flow = ComparedFlow {
        src: ends.remote,
        dst: ends.local,
        src_port: ends.remote_port,
        dst_port: ends.local_port,
        protocol: TCP as u16,
        uid: Owner::NONE.uid,
        gid: Owner::NONE.gid,
        ..ComparedFlow::zeroed()
    };
    let expected = expected(reason.verdict());
    let mut actual = outcome_at(pod, listener);
    if listener == ends.local_port && actual != expected {
        // It dialled a port of the proxy.
        actual = outcome::PASSED;
    }
    compare(netns, &flow, Verdicts { reason: reason.number(), expected, actual });
}

/// The interface on which a connection arrived, where the decision depends on it. `None` if it is not known any more.
#[inline(always)]
fn ifindex(netns: NetnsCookie, pod: &PodPolicy, ends: &Ends) -> Option<u32> {
    if pod.flags & policy::INTERFACES == 0 {
        return Some(0);
    }
    flows::get(&arrival_key(netns, ends)).map(|flow| flow.ifindex)
}

#[inline(always)]
fn is_own(pod: &PodPolicy, addr: Addr) -> bool {
    addr.is_loopback()
        || maps::destination(pod.id, addr).is_some_and(|found| found.flags & destination::LO != 0)
}

/// The lookup for a SYN from outside: only here its interface is known.
#[inline(always)]
pub(crate) fn looked_up(ctx: &SkLookupContext, netns: NetnsCookie, pod: &PodPolicy) {
    if pod.flags & policy::INTERFACES == 0 {
        return;
    }
    let ends = context::lookup_ends(ctx.lookup);
    let ifindex = load!(load_u32, bpf_sk_lookup, ctx.lookup, ingress_ifindex);
    let flow = RememberedFlow { ifindex, ..RememberedFlow::zeroed() };
    flows::insert(&arrival_key(netns, &ends), &flow);
}

/// A client's connection is established: compares.
#[inline(always)]
pub(crate) fn established(ctx: &SockOpsContext) {
    let netns = maps::netns_cookie(ctx);
    let Some(pod) = pod(netns) else { return };
    let isn = load!(load_u32, bpf_sock_ops, ctx.ops, snd_nxt).wrapping_sub(1);
    let key = syn_key(netns, isn);
    // Forgotten, not decided in connect(), or with data in its SYN.
    let Some(flow) = flows::get(&key) else { return uncompared(netns) };
    flows::remove(&key);
    let mut actual = outcome_at(pod, flow.listener);
    let reached_its_own =
        flow.listener == flow.dst_port && flow.local_port == flow.dst_port && flow.local == flow.dst;
    if reached_its_own && actual != flow.expected {
        // It dialled a port of the proxy.
        actual = outcome::PASSED;
    }
    let ends = context::callback_ends(ctx.ops);
    let compared = ComparedFlow {
        src: ends.local,
        dst: flow.dst,
        src_port: ends.local_port,
        dst_port: flow.dst_port,
        protocol: TCP as u16,
        uid: flow.uid,
        gid: flow.gid,
        ..ComparedFlow::zeroed()
    };
    compare(netns, &compared, Verdicts { reason: flow.reason, expected: flow.expected, actual });
}

/// The proxy asks for the original destination, and conntrack has answered: compares the answer, once for each connection.
#[inline(always)]
pub(crate) fn asked(ctx: &SockoptContext, sk: Sock, netns: NetnsCookie, ends: &Ends) {
    let Some(pod) = pod(netns) else { return };
    let actual = outcome_at(pod, ends.local_port);
    if actual == outcome::PASSED {
        return;
    }
    let (key, asked_by) = (ends_key(netns, ends), sk.as_ptr() as u64);
    let remembered = flows::get(&key);
    if remembered.is_some_and(|flow| flow.asked_by == asked_by) {
        return;
    }
    let Some((addr, port)) = conntrack_answer(ctx.sockopt) else { return };
    if pod.flags & policy::TPROXY != 0 && port == ends.local_port && port != pod.inbound_port {
        // It dialled this port of the proxy, and was compared when its SYN arrived if TPROXY took it.
        return;
    }
    if flows::change(&key, |flow| flow.asked_by = asked_by).is_none() {
        flows::insert(&key, &RememberedFlow { asked_by, ..RememberedFlow::zeroed() });
    }
    // An earlier connection between these ends may have left its own.
    let own = remembered.filter(|flow| flow.listener != 0 && flow.asked_by == 0);
    let Some(flow) = own else {
        if is_own(pod, ends.remote) {
            return uncompared(netns);
        }
        let Some(ifindex) = ifindex(netns, pod, ends) else { return uncompared(netns) };
        let original = Ends { local: addr, local_port: port, ..*ends };
        return inbound(netns, pod, &original, (ifindex, ends.local_port));
    };
    // The connection itself was compared when it was established.
    if flow.expected != actual || (flow.dst == addr && flow.dst_port == port) {
        return;
    }
    let compared = ComparedFlow {
        src: ends.remote,
        dst: flow.dst,
        other: addr,
        src_port: ends.remote_port,
        dst_port: flow.dst_port,
        other_port: port,
        protocol: TCP as u16,
        ..ComparedFlow::zeroed()
    };
    let verdicts = Verdicts { reason: flow.reason, expected: flow.expected, actual: outcome::OTHER_DST };
    compare(netns, &compared, verdicts);
}

/// A datagram is read: by the proxy a query, by its client an answer.
#[inline(always)]
pub(crate) fn received<F: AddressFamily>(ctx: &SockAddrContext) {
    let netns = maps::netns_cookie(ctx);
    let Some(pod) = pod(netns) else { return };
    let sk = Sock::of_call(ctx);
    let (own_port, sender_port) = (sk.bound_port(), context::named_port(ctx));
    if own_port == pod.dns_port {
        let flow = RememberedFlow { time: compare::now(), ..RememberedFlow::zeroed() };
        flows::insert(&query_key(netns, F::named(ctx), sender_port), &flow);
        return;
    }
    let Some(socket) = flows::socket(sk).filter(|socket| socket.is_waiting != 0) else { return };
    let sender = F::named(ctx);
    if sender_port != socket.dst_port || sender != socket.dst {
        return;
    }
    // Not deleted: the next query needs it again.
    let _there = flows::set_socket(sk, ShadowSocket { is_waiting: 0, ..socket });
    let reached =
        flows::get(&query_key(netns, socket.dst, own_port)).is_some_and(|query| query.time >= socket.time);
    let actual = if reached { outcome::DNS } else { outcome::PASSED };
    let compared = ComparedFlow {
        src: F::bound(sk),
        dst: socket.dst,
        src_port: own_port,
        dst_port: socket.dst_port,
        protocol: UDP as u16,
        uid: socket.uid,
        gid: socket.gid,
        ..ComparedFlow::zeroed()
    };
    compare(netns, &compared, Verdicts { reason: socket.reason, expected: socket.expected, actual });
}

/// A port is that of one socket for each family: of the address only the family counts, because a client that is not bound
/// does not know its own.
#[inline(always)]
fn query_key(netns: NetnsCookie, addr: Addr, port: u16) -> ShadowKey {
    let family = if addr.is_v4() { Addr::LOCALHOST_V4 } else { Addr::LOCALHOST_V6 };
    ShadowKey { netns, addr: family, number: port.into(), kind: remembered::QUERY }
}
