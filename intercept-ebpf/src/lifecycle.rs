//! The life of a connection and of a listener, from the kernel's TCP callbacks.
//!
//! An original destination is stored before the SYN leaves (so also for a SYN that carries data), is held by both
//! ends, and goes when the last of them closes. A client that sends, closes and is forgotten before the proxy
//! accepts is why the proxy's end counts; a client that asks for its peer after the proxy closed is why its own
//! end does.

use aya_ebpf::{
    bindings::{
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_RWND_INIT,
        BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB,
        BPF_SOCK_OPS_TCP_LISTEN_CB, BPF_TCP_CLOSE, BPF_TCP_SYN_SENT, bpf_sock, bpf_sock_ops,
    },
    programs::{SockContext, SockOpsContext},
};
use bytemuck::Zeroable as _;
use intercept_common::{
    Slot,
    failure::{Failure, OnFailure},
    layout::{ConnKey, OrigDst, SocketState, end, socket},
};

use crate::{
    atomic,
    context::{self, Sock, load},
    handshake, listeners, maps, observe,
    original::{client_key, proxy_key},
    proxy::ProxyState,
    refusal, shadow,
    storage::{self, StoredSocket},
};

/// A callback; most of the kernel's are none of ours and must cost nothing.
#[inline(always)]
pub(crate) fn callback(ctx: &SockOpsContext) {
    match load!(load_u32, bpf_sock_ops, ctx.ops, op) {
        BPF_SOCK_OPS_STATE_CB => state(ctx),
        BPF_SOCK_OPS_TCP_CONNECT_CB => dial(ctx),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => accepted(ctx),
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB if shadow::is_on() => shadow::established(ctx),
        BPF_SOCK_OPS_TCP_LISTEN_CB => listeners::listen(ctx),
        // For a listener the callback of a request.
        BPF_SOCK_OPS_RWND_INIT if shadow::is_on() && Sock::of_callback(ctx).is_none() => {
            shadow::received_syn(ctx)
        }
        // For a client the first callback after its own.
        BPF_SOCK_OPS_RWND_INIT => check_callbacks(ctx),
        _ => {}
    }
}

/// A SYN is about to leave: the local port is known now.
#[inline(always)]
fn dial(ctx: &SockOpsContext) {
    let Some(sk) = Sock::of_callback(ctx) else { return };
    if shadow::is_on() {
        shadow::dial(ctx, sk);
    }
    let Some(state) = StoredSocket::of(sk).map(StoredSocket::read) else { return };
    let ends = match state.kind {
        socket::REDIRECTED => end::CLIENT,
        socket::STEERED => end::CLIENT | end::STEERED,
        socket::BYPASS => end::CLIENT | end::BYPASS,
        _ => return,
    };
    let netns = maps::netns_cookie(ctx);
    let key = client_key(netns, &context::callback_ends(ctx.ops));
    let value = OrigDst::new(state.addr, state.source, state.port, ends, state.slot);
    StoredSocket::delete(sk);
    match maps::add_orig_dst(&key, &value) {
        Ok(true) => add_connections(Slot(state.slot.into()), 1),
        // Its last connection had the same ends, and was not seen to end.
        Ok(false) => {}
        Err(_) => {
            if let Some(pod) = maps::pod(netns) {
                observe::failure_line!(
                    ctx,
                    netns,
                    pod,
                    Failure::OrigDstFull,
                    "storing an original destination of netns {}: ORIG_DST is full, raise --max-connections"
                );
            }
            if matches!(Failure::OrigDstFull.policy(), OnFailure::Closed) {
                refusal::bar(ctx, sk);
            }
            return;
        }
    }
    handshake::note(sk, &key);
    watch_state(ctx);
}

/// A connection was accepted by the kernel: if it is one of ours the proxy's end holds it from here on.
#[inline(always)]
fn accepted(ctx: &SockOpsContext) {
    let ends = context::callback_ends(ctx.ops);
    if !ends.may_be_redirected() {
        return;
    }
    let netns = maps::netns_cookie(ctx);
    let key = proxy_key(netns, &ends);
    if hold(ctx, &key) {
        return;
    }
    if let Some(sk) = Sock::of_callback(ctx)
        && let Some(key) = handshake::find(ctx, netns, &ends)
        && maps::orig_dst(&key).is_some()
        && handshake::remember(sk, &key).is_some()
    {
        hold(ctx, &key);
    }
}

/// The proxy's end holds an entry. False if there is none.
#[inline(always)]
fn hold(ctx: &SockOpsContext, key: &ConnKey) -> bool {
    let Some(entry) = maps::orig_dst(key) else { return false };
    // SAFETY: aligned and inside a map element, which outlives the program.
    let before = unsafe { atomic::fetch_or(&raw mut (*entry).port_and_ends, end::PROXY) };
    watch_state(ctx);
    if is_overruled(OrigDst::slot(before)) {
        release_on_close(ctx, *key, end::PROXY);
    }
    true
}

/// A SYN follows. Another program that sets the socket's callbacks without keeping those that are set (it may be attached
/// above the pod, so that it is always later) takes the one away that ends the entry. Then the socket's close() ends it.
#[inline(always)]
fn check_callbacks(ctx: &SockOpsContext) {
    if load!(load_u32, bpf_sock_ops, ctx.ops, bpf_sock_ops_cb_flags) & BPF_SOCK_OPS_STATE_CB_FLAG != 0 {
        return;
    }
    let ends = context::callback_ends(ctx.ops);
    if !ends.remote.is_loopback() && !ends.remote.is_stand_in() && ends.local != ends.remote {
        return;
    }
    let key = client_key(maps::netns_cookie(ctx), &ends);
    let Some(entry) = maps::orig_dst(&key) else { return };
    // SAFETY: as in `hold`.
    let slot = OrigDst::slot(unsafe { (*entry).port_and_ends });
    if let Some(proxy) = ProxyState::of(slot) {
        proxy.set_overruled();
    }
    release_on_close(ctx, key, end::CLIENT);
}

#[inline(always)]
fn is_overruled(slot: Slot) -> bool {
    ProxyState::of(slot).is_some_and(ProxyState::is_overruled)
}

#[inline(always)]
fn release_on_close(ctx: &SockOpsContext, mut key: ConnKey, gone: u64) {
    if let Some(sk) = Sock::of_callback(ctx) {
        key.reserved = (gone >> 32) as u32;
        // Without memory the entry stays until the agent collects it.
        let _collected_later = storage::release_with(sk, key);
    }
}

/// A process has closed a socket. The kernel may go on with the connection, so that a client that closes before the
/// proxy's end is there leaves the entry to that end.
#[inline(always)]
pub(crate) fn closed(ctx: &SockContext) {
    let Some(mut key) = storage::release_of(ctx) else { return };
    let gone = u64::from(key.reserved) << 32;
    key.reserved = 0;
    if gone == end::CLIENT {
        let Some(entry) = maps::orig_dst(&key) else { return };
        let state = load!(load_u32, bpf_sock, ctx.sock, state);
        // SAFETY: as in `hold`.
        let ends = unsafe { (*entry).port_and_ends };
        if ends & end::PROXY == 0 && state != BPF_TCP_CLOSE && state != BPF_TCP_SYN_SENT {
            // SAFETY: as in `hold`.
            let _before = unsafe { atomic::fetch_or(&raw mut (*entry).port_and_ends, end::ABANDONED) };
            return;
        }
    }
    release(&key, gone);
}

#[inline(always)]
fn add_connections(slot: Slot, more: i64) {
    if let Some(proxy) = ProxyState::of(slot) {
        proxy.add_connections(more);
    }
}

/// A watched socket changed state.
#[inline(always)]
fn state(ctx: &SockOpsContext) {
    if load!(load_u32, bpf_sock_ops, ctx.ops, __bindgen_anon_1, 1) != BPF_TCP_CLOSE {
        return;
    }
    let netns = maps::netns_cookie(ctx);
    let ends = context::callback_ends(ctx.ops);
    let key = client_key(netns, &ends);
    if load!(load_u32, bpf_sock_ops, ctx.ops, __bindgen_anon_1, 0) == BPF_TCP_SYN_SENT {
        return refused(ctx, &key);
    }
    if release(&key, end::CLIENT) || release(&proxy_key(netns, &ends), end::PROXY) {
        return;
    }
    if let Some(sk) = Sock::of_callback(ctx)
        && let Some(key) = handshake::key(sk, netns, &ends)
    {
        release(&key, end::PROXY);
    }
}

/// A client's connection was refused. A non-blocking socket keeps its name until the next `connect()`.
#[inline(always)]
fn refused(ctx: &SockOpsContext, key: &ConnKey) {
    let Some(entry) = maps::orig_dst(key) else { return };
    // SAFETY: as in `hold`; a removed element is freed after a grace period.
    let (source, before) =
        unsafe { ((*entry).source, atomic::fetch_and(&raw mut (*entry).port_and_ends, !end::CLIENT)) };
    // The proxy's end exists before the client's only with data in the SYN.
    if before & end::PROXY == 0 && maps::remove_orig_dst(key) {
        add_connections(OrigDst::slot(before), -1);
    }
    if !source.is_unspecified()
        && let Some(sk) = Sock::of_callback(ctx)
    {
        // Out of memory, getsockname() returns the source of the default route.
        let _kept =
            StoredSocket::set(sk, SocketState { kind: socket::FAILED, source, ..SocketState::zeroed() });
    }
}

/// One end is gone; the last takes the entry with it. False if there is no such entry.
#[inline(always)]
fn release(key: &ConnKey, gone: u64) -> bool {
    let Some(entry) = maps::orig_dst(key) else { return false };
    // SAFETY: as in `hold`.
    let before = unsafe { atomic::fetch_and(&raw mut (*entry).port_and_ends, !gone) };
    let mut left = before & !gone & (end::CLIENT | end::PROXY);
    if before & end::ABANDONED != 0 {
        left &= !end::CLIENT;
    }
    if left == 0 && maps::remove_orig_dst(key) {
        add_connections(OrigDst::slot(before), -1);
    }
    true
}

#[inline(always)]
fn watch_state(ctx: &SockOpsContext) {
    let flags = load!(load_u32, bpf_sock_ops, ctx.ops, bpf_sock_ops_cb_flags) | BPF_SOCK_OPS_STATE_CB_FLAG;
    // Fails only for sockets that are not full ones, which none of the callbacks above has.
    let _full_socket = ctx.set_cb_flags(flags as i32);
}
