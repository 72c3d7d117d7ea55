//! Pairs the two ends of a connection, in the kernel's TCP callbacks.
//!
//! Both ends know the initial sequence numbers of both directions, whatever rewrites addresses and ports between them. Two
//! connections have the same 64 bits only by chance. The connecting end is established first and publishes an offer under
//! these numbers; the accepting end finds it. With data in the SYN the numbers differ, and the connection stays on TCP.
//!
//! A socket can be added to the map of ends only while it becomes established, and a socket in the map is slower if it then
//! uses TCP. The connecting end must therefore know whether its peer is on this node before the peer exists. When a SYN
//! arrives at an accelerated pod, its source is noted; a socket that connects from that source has its peer on this node.
//! The note decides nothing else.

use aya_ebpf::{
    bindings::{
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_RWND_INIT,
        BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB,
        BPF_SOCK_OPS_TCP_LISTEN_CB, BPF_TCP_CLOSE, bpf_sock, bpf_sock_ops,
    },
    programs::SockOpsContext,
};
use intercept_common::{
    Addr,
    acceleration::{JoinCount, JoinEnd, JoinOffer, JoinSocket, SequenceKey, kind},
};

use crate::{
    context::{self, AF_INET6, load},
    maps,
    observe::{self, Side},
    proxy, short,
};

/// Dispatches a callback. The kernel makes many others, which must cost nothing.
#[inline(always)]
pub(crate) fn callback(ctx: &SockOpsContext) {
    match load!(load_u32, bpf_sock_ops, ctx.ops, op) {
        BPF_SOCK_OPS_STATE_CB => state(ctx),
        BPF_SOCK_OPS_RWND_INIT => arriving(ctx),
        BPF_SOCK_OPS_TCP_CONNECT_CB => dial(ctx),
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => dialled(ctx),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => accepted(ctx),
        BPF_SOCK_OPS_TCP_LISTEN_CB => listen(ctx),
        _ => {}
    }
}

/// The socket of a callback.
#[inline(always)]
fn sock(ctx: &SockOpsContext) -> *mut bpf_sock {
    load!(load_u64, bpf_sock_ops, ctx.ops, __bindgen_anon_2) as *mut bpf_sock
}

/// A SYN arrived: the kernel asks for the initial receive window.
#[inline(always)]
fn arriving(ctx: &SockOpsContext) {
    // The kernel asks this for a connecting socket as well.
    if load!(load_u32, bpf_sock_ops, ctx.ops, is_fullsock) != 0 {
        return;
    }
    let ops = ctx.ops;
    let port = u32::from_be(load!(load_u32, bpf_sock_ops, ops, remote_port)) as u16;
    // An IPv6 listener may accept IPv4; the kernel has filled in only one of the two addresses.
    note(Addr::from_v4(load!(load_u32, bpf_sock_ops, ops, remote_ip4)), port);
    if load!(load_u32, bpf_sock_ops, ops, family) == AF_INET6 {
        let remote = Addr::from_v6([
            load!(load_u32, bpf_sock_ops, ops, remote_ip6, 0),
            load!(load_u32, bpf_sock_ops, ops, remote_ip6, 1),
            load!(load_u32, bpf_sock_ops, ops, remote_ip6, 2),
            load!(load_u32, bpf_sock_ops, ops, remote_ip6, 3),
        ]);
        note(remote, port);
    }
}

#[inline(always)]
fn note(addr: Addr, port: u16) {
    let hash = hash(addr, port);
    if let Some(cell) = maps::hint(hash) {
        // SAFETY: an element of an array map; one word, written whole.
        unsafe { core::ptr::write_volatile(cell, hash) };
    }
}

/// Whether a SYN from this source arrived at an accelerated pod. Clears the note.
#[inline(always)]
fn was_noted(addr: Addr, port: u16) -> bool {
    let hash = hash(addr, port);
    let Some(cell) = maps::hint(hash) else { return false };
    // SAFETY: as in `note`.
    unsafe {
        let noted = core::ptr::read_volatile(cell) == hash;
        if noted {
            core::ptr::write_volatile(cell, 0);
        }
        noted
    }
}

#[inline(always)]
pub(crate) fn hash(addr: Addr, port: u16) -> u64 {
    let words = addr.words();
    let mut hash = u64::from(port) | 1 << 32;
    let mut at = 0;
    while at < 4 {
        hash = (hash ^ u64::from(words[at])).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        hash ^= hash >> 29;
        at += 1;
    }
    hash
}

/// A SYN is about to be sent, in the system call that connects.
#[inline(always)]
fn dial(ctx: &SockOpsContext) {
    let sk = sock(ctx);
    if sk.is_null() {
        return;
    }
    let Some((pod, policy)) = proxy::pod(ctx) else { return };
    let ends = context::callback_ends(ctx.ops);
    // To the application of the same pod.
    if ends.remote.is_loopback() || ends.local.is_loopback() || ends.remote == ends.local {
        return;
    }
    if !proxy::owns(policy, sk) {
        return;
    }
    if short::is_likely(pod.netns, &ends) {
        return observe::connection(&pod, &ends, Side::Dialled, JoinCount::Short, observe::NO_NAME);
    }
    if proxy::made(ctx, sk, &pod, policy, Side::Dialled) {
        let _no_memory =
            maps::new_socket(sk, &mut JoinSocket { kind: kind::DIALLING, pod, ..JoinSocket::default() });
    }
}

/// A connecting socket is established.
#[inline(always)]
fn dialled(ctx: &SockOpsContext) {
    let sk = sock(ctx);
    if sk.is_null() {
        return;
    }
    let Some(socket) = maps::socket(sk) else { return };
    if socket.kind != kind::DIALLING {
        return;
    }
    let ends = context::callback_ends(ctx.ops);
    if !was_noted(ends.local, ends.local_port) {
        return;
    }
    let sequence = SequenceKey {
        dialled: load!(load_u32, bpf_sock_ops, ctx.ops, snd_nxt),
        accepted: load!(load_u32, bpf_sock_ops, ctx.ops, rcv_nxt),
    };
    let end = JoinEnd { sock: sk as u64, cookie: maps::socket_cookie(ctx), pod: socket.pod };
    let offer = JoinOffer { dialled: end, accepted: JoinEnd::default() };
    // The offer comes last: the peer is established by the ACK that is sent after this callback.
    if !maps::add_end(ctx, end.cookie) || !maps::add_offer(&sequence, &offer) {
        observe::connection(&end.pod, &ends, Side::Dialled, JoinCount::RefusedFull, observe::NO_NAME);
        return;
    }
    socket.kind = kind::OFFERED;
    socket.sequence = sequence;
    watch_state(ctx);
}

/// An accepting socket is established; its storage is a copy of the listener's.
#[inline(always)]
fn accepted(ctx: &SockOpsContext) {
    let sk = sock(ctx);
    if sk.is_null() {
        return;
    }
    let Some(socket) = maps::socket(sk) else { return };
    if socket.kind != kind::LISTENER || !maps::is_on(&socket.pod) {
        return;
    }
    let sequence = SequenceKey {
        dialled: load!(load_u32, bpf_sock_ops, ctx.ops, rcv_nxt),
        accepted: load!(load_u32, bpf_sock_ops, ctx.ops, snd_nxt),
    };
    let Some(mut offer) = maps::offer(&sequence) else { return };
    // Answered: another connection has the same numbers.
    if offer.accepted.cookie != 0 {
        return;
    }
    offer.accepted = JoinEnd { sock: sk as u64, cookie: maps::socket_cookie(ctx), pod: socket.pod };
    let ends = context::callback_ends(ctx.ops);
    if !maps::add_end(ctx, offer.accepted.cookie) {
        observe::connection(&socket.pod, &ends, Side::Accepted, JoinCount::RefusedFull, observe::NO_NAME);
        return;
    }
    if maps::answer_offer(&sequence, &offer) {
        socket.kind = kind::PAIRED;
        socket.peer = offer.dialled;
        observe::connection(&socket.pod, &ends, Side::Accepted, JoinCount::Joined, observe::NO_NAME);
        maps::count(&offer.dialled.pod, JoinCount::Joined as usize);
    }
}

/// A watched socket changed its state: a closed socket withdraws its offer, or was joined.
#[inline(always)]
fn state(ctx: &SockOpsContext) {
    if load!(load_u32, bpf_sock_ops, ctx.ops, __bindgen_anon_1, 1) != BPF_TCP_CLOSE {
        return;
    }
    let sk = sock(ctx);
    if sk.is_null() {
        return;
    }
    let Some(socket) = maps::socket(sk) else { return };
    if socket.kind == kind::OFFERED {
        maps::remove_offer(&socket.sequence);
    }
    if socket.messages <= 1 {
        short::ended(socket.pod.netns, &context::callback_ends(ctx.ops));
    }
}

#[inline(always)]
fn watch_state(ctx: &SockOpsContext) {
    let flags = load!(load_u32, bpf_sock_ops, ctx.ops, bpf_sock_ops_cb_flags) | BPF_SOCK_OPS_STATE_CB_FLAG;
    // Fails only for request sockets.
    let _full_socket = ctx.set_cb_flags(flags as i32);
}

/// A socket starts to listen: marks it if it is an accepted proxy's listener on the inbound port.
#[inline(always)]
fn listen(ctx: &SockOpsContext) {
    let sk = sock(ctx);
    if sk.is_null() {
        return;
    }
    let Some((pod, policy)) = proxy::pod(ctx) else { return };
    let port = load!(load_u32, bpf_sock_ops, ctx.ops, local_port) as u16;
    if port != policy.inbound_port {
        return;
    }
    if proxy::owns(policy, sk) && proxy::made(ctx, sk, &pod, policy, Side::Accepted) {
        let _no_memory =
            maps::new_socket(sk, &mut JoinSocket { kind: kind::LISTENER, pod, ..JoinSocket::default() });
    } else {
        maps::forget_socket(sk);
    }
}
