//! Shadow mode: a decision is remembered and compared with what happened to the connection. Nothing is changed, and what
//! cannot be remembered is not compared.
//!
//! A connection of the pod is remembered by the sequence number of its SYN, which NAT does not change. If the SYN reaches
//! a listener of the pod, its request notes there which. The answer to the SYN comes later, so when the client's end is
//! established, it is known whether the proxy has the connection. Where a connection from outside was redirected from is
//! known to conntrack alone; it is compared when the proxy asks for it. A query is compared when its answer is read.
//!
//! Each end finds that number without a note of its own: what a socket has sent or received is counted from it.

use aya_ebpf::{
    bindings::bpf_sk_lookup,
    programs::{SkLookupContext, SockAddrContext, SockOpsContext, SockoptContext},
};
use bytemuck::Zeroable as _;
use intercept_common::{
    Addr, NetnsCookie, ProxyListener, Reason, Verdict,
    decide::{OutboundFlow, Owner, TproxyMark},
    layout::{
        ComparedFlow, ConnKey, PodPolicy, ProxyPort, RememberedFlow, ShadowConn, ShadowKey, ShadowSocket,
        outcome, policy, remembered, stage,
    },
};

use self::{
    compare::{Verdicts, compare, uncompared},
    connections::KnownConn,
    request::SynRequest,
};
use crate::{
    context::{self, AddressFamily, Ends, Sock, TCP, UDP, load},
    handshake, maps,
    original::{conntrack_answer, proxy_key},
    verdict::{self, Outbound},
};

mod compare;
mod connections;
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
pub(crate) fn pod(netns: NetnsCookie) -> Option<&'static PodPolicy> {
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
        let _counted = uncompared(maps::netns_cookie(ctx));
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
    let conn = ShadowConn {
        dst: socket.dst,
        dst_port: socket.dst_port,
        uid: socket.uid,
        gid: socket.gid,
        reason: socket.reason,
        expected: socket.expected,
        ..ShadowConn::zeroed()
    };
    KnownConn::remember(maps::netns_cookie(ctx), isn, conn);
}

/// TPROXY looks the proxy's port up, not that of the SYN, so only the client's end counts. Its connections arrive on one
/// interface.
#[inline(always)]
fn arrival_key(netns: NetnsCookie, ends: &Ends) -> ShadowKey {
    ShadowKey { netns, addr: ends.remote, port: ends.remote_port.into(), kind: remembered::ARRIVAL }
}

/// A listener of the pod has received a SYN: the callback is that of the request.
#[inline(always)]
pub(crate) fn received_syn(ctx: &SockOpsContext) {
    let netns = maps::netns_cookie(ctx);
    let Some(pod) = pod(netns) else { return };
    let Some(request) = SynRequest::of(ctx) else { return };
    let mut actual = outcome_at(pod, request.listener);
    let Some(conn) = KnownConn::find(netns, request.isn) else {
        return received_from_outside(netns, pod, &request, actual);
    };
    if conn.stage() & stage::UNCOMPARED != 0 {
        // Its SYN has come again.
        return;
    }
    let (dst, dst_port) = conn.dst();
    let ends = &request.ends;
    let reached_its_own = request.listener == dst_port && ends.local_port == dst_port && ends.local == dst;
    if reached_its_own && actual != conn.expected() {
        // It dialled a port of the proxy.
        actual = outcome::PASSED;
    }
    conn.set_stage(stage::RECEIVED | u32::from(actual));
}

#[inline(always)]
fn received_from_outside(netns: NetnsCookie, pod: &PodPolicy, request: &SynRequest, actual: u8) {
    let ends = &request.ends;
    if actual != outcome::PASSED && request.listener == ends.local_port {
        // Redirected by NAT: only conntrack knows from where.
        return;
    }
    inbound(netns, pod, request.isn, ends, request.listener);
}

/// Counts a connection that cannot be compared, once.
#[inline(always)]
fn give_up(netns: NetnsCookie, isn: u32) {
    if uncompared(netns) {
        KnownConn::note(netns, isn, stage::UNCOMPARED);
    }
}

/// Decides on a connection from outside and compares. The local end is the original destination. `None` if it cannot be compared.
#[inline(always)]
fn inbound(netns: NetnsCookie, pod: &PodPolicy, isn: u32, ends: &Ends, listener: u16) -> Option<()> {
    let Some(ifindex) = ifindex(netns, pod, ends) else {
        give_up(netns, isn);
        return None;
    };
    let conn: ConnKey = proxy_key(netns, ends);
    let reason = verdict::inbound(pod, &conn, ifindex);
    if reason.number() == Reason::LocalSource as u8 {
        // Of a socket of the pod that was connected earlier, or was made in another cgroup.
        give_up(netns, isn);
        return None;
    }
    crate::observe::inbound(pod, &conn, reason);
    let expected = expected(reason.verdict());
    let mut actual = outcome_at(pod, listener);
    if listener == ends.local_port && actual != expected {
        // It dialled a port of the proxy.
        actual = outcome::PASSED;
    }
    compare(netns, Verdicts { reason: reason.number(), expected, actual }, || ComparedFlow {
        src: ends.remote,
        dst: ends.local,
        src_port: ends.remote_port,
        dst_port: ends.local_port,
        protocol: TCP as u16,
        uid: Owner::NONE.uid,
        gid: Owner::NONE.gid,
        ..ComparedFlow::zeroed()
    });
    Some(())
}

/// The interface on which a connection arrived, where the decision depends on it. `None` if it is not known any more.
#[inline(always)]
fn ifindex(netns: NetnsCookie, pod: &PodPolicy, ends: &Ends) -> Option<u32> {
    if pod.flags & policy::INTERFACES == 0 {
        return Some(0);
    }
    flows::get(&arrival_key(netns, ends)).map(|flow| flow.ifindex)
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
    let isn = context::callback_isn(ctx.ops);
    // Of a pod that is not in shadow mode, forgotten, or not decided in connect().
    let Some(conn) = KnownConn::find(netns, isn) else { return give_up(netns, isn) };
    let seen = conn.stage();
    if seen & stage::UNCOMPARED != 0 {
        return;
    }
    let actual = if seen & stage::RECEIVED != 0 { (seen & stage::OUTCOME) as u8 } else { outcome::PASSED };
    let verdicts = Verdicts { reason: conn.reason(), expected: conn.expected(), actual };
    // Where its SYN arrived was not noted if the pod has left shadow mode since.
    if verdicts.expected != verdicts.actual && pod(netns).is_none() {
        if uncompared(netns) {
            conn.set_stage(seen | stage::UNCOMPARED);
        }
        return;
    }
    compare(netns, verdicts, || {
        let ends = context::callback_ends(ctx.ops);
        let ((dst, dst_port), (uid, gid)) = (conn.dst(), conn.owner());
        ComparedFlow {
            src: ends.local,
            dst,
            src_port: ends.local_port,
            dst_port,
            protocol: TCP as u16,
            uid,
            gid,
            ..ComparedFlow::zeroed()
        }
    });
}

/// The proxy asks for the original destination, and conntrack has answered: compares the answer, once for each connection.
#[inline(always)]
pub(crate) fn asked(ctx: &SockoptContext, sk: Sock, netns: NetnsCookie, pod: &PodPolicy, ends: &Ends) {
    let actual = outcome_at(pod, ends.local_port);
    if actual == outcome::PASSED {
        return;
    }
    let Some(isn) = sk.peer_isn() else { return };
    let conn = KnownConn::find(netns, isn);
    let seen = conn.map_or(0, KnownConn::stage);
    if seen & (stage::ASKED | stage::UNCOMPARED) != 0 {
        return;
    }
    let Some((addr, port)) = conntrack_answer(ctx.sockopt) else { return };
    if pod.flags & policy::TPROXY != 0 && port == ends.local_port && port != pod.inbound_port {
        // It dialled this port of the proxy, and was compared when its SYN arrived if TPROXY took it.
        return;
    }
    let Some(conn) = conn else {
        let original = Ends { local: addr, local_port: port, ..*ends };
        if inbound(netns, pod, isn, &original, ends.local_port).is_some() {
            KnownConn::note(netns, isn, stage::ASKED);
        }
        return;
    };
    conn.set_stage(seen | stage::ASKED);
    // The connection itself was compared when it was established.
    let (dst, dst_port) = conn.dst();
    if conn.expected() != actual || (dst == addr && dst_port == port) {
        return;
    }
    let verdicts = Verdicts { reason: conn.reason(), expected: conn.expected(), actual: outcome::OTHER_DST };
    let (uid, gid) = conn.owner();
    compare(netns, verdicts, || ComparedFlow {
        src: ends.remote,
        dst,
        other: addr,
        src_port: ends.remote_port,
        dst_port,
        other_port: port,
        protocol: TCP as u16,
        uid,
        gid,
        ..ComparedFlow::zeroed()
    });
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
    let verdicts = Verdicts { reason: socket.reason, expected: socket.expected, actual };
    compare(netns, verdicts, || ComparedFlow {
        src: F::bound(sk),
        dst: socket.dst,
        src_port: own_port,
        dst_port: socket.dst_port,
        protocol: UDP as u16,
        uid: socket.uid,
        gid: socket.gid,
        ..ComparedFlow::zeroed()
    });
}

/// A port is that of one socket for each family: of the address only the family counts, because a client that is not bound
/// does not know its own.
#[inline(always)]
fn query_key(netns: NetnsCookie, addr: Addr, port: u16) -> ShadowKey {
    let family = if addr.is_v4() { Addr::LOCALHOST_V4 } else { Addr::LOCALHOST_V6 };
    ShadowKey { netns, addr: family, port: port.into(), kind: remembered::QUERY }
}
