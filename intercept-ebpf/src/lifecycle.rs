//! The life of a connection and of a listener, from the kernel's TCP callbacks.
//!
//! An original destination is stored before the SYN leaves (so also for a SYN that carries data), is held by both
//! ends, and goes when the last of them closes. A client that sends, closes and is forgotten before the proxy
//! accepts is why the proxy's end counts; a client that asks for its peer after the proxy closed is why its own
//! end does.

use aya_ebpf::{
    bindings::{
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
        BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_SOCK_OPS_TCP_LISTEN_CB, BPF_TCP_CLOSE, bpf_sock, bpf_sock_ops,
    },
    programs::SockOpsContext,
};
use intercept_common::{
    failure::Failure,
    layout::{ConnKey, LISTENER_SLOTS, ListenerKey, OrigDst, end, proxy, socket},
};

use crate::{
    atomic,
    context::{self, AF_INET6, load},
    maps, observe,
    original::{client_key, proxy_key},
};

/// A callback; most of the kernel's are none of ours and must cost nothing.
#[inline(always)]
pub(crate) fn callback(ctx: &SockOpsContext) {
    match load!(load_u32, bpf_sock_ops, ctx.ops, op) {
        BPF_SOCK_OPS_STATE_CB => state(ctx),
        BPF_SOCK_OPS_TCP_CONNECT_CB => dial(ctx),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => accepted(ctx),
        BPF_SOCK_OPS_TCP_LISTEN_CB => listen(ctx),
        _ => {}
    }
}

/// A SYN is about to leave: the local port is known now.
#[inline(always)]
fn dial(ctx: &SockOpsContext) {
    let sk = load!(load_u64, bpf_sock_ops, ctx.ops, __bindgen_anon_2) as *mut bpf_sock;
    if sk.is_null() {
        return;
    }
    let Some(state) = maps::socket(sk) else { return };
    let ends = match state.kind {
        socket::REDIRECTED => end::CLIENT,
        socket::STEERED => end::CLIENT | end::STEERED,
        socket::ONWARD => end::CLIENT | end::ONWARD,
        _ => return,
    };
    let netns = maps::netns_cookie(ctx);
    let key = client_key(netns, &context::callback_ends(ctx.ops));
    let value = OrigDst::new(state.addr, state.port, ends);
    maps::forget_socket(sk);
    if maps::add_orig_dst(&key, &value).is_err() {
        if let Some(pod) = maps::pod(netns) {
            observe::failure_line!(
                ctx,
                netns,
                pod,
                Failure::OrigDstFull,
                "storing an original destination of netns {}: ORIG_DST is full, raise --max-connections"
            );
        }
        return;
    }
    watch_state(ctx);
}

/// A connection was accepted by the kernel: if it is one of ours the proxy's end holds it from here on.
#[inline(always)]
fn accepted(ctx: &SockOpsContext) {
    let ends = context::callback_ends(ctx.ops);
    if !ends.may_be_redirected() {
        return;
    }
    let key = proxy_key(maps::netns_cookie(ctx), &ends);
    if let Some(entry) = maps::orig_dst(&key) {
        // SAFETY: aligned and inside a map element, which outlives the program.
        let _before = unsafe { atomic::fetch_or(&raw mut (*entry).port_and_ends, end::PROXY) };
        watch_state(ctx);
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
    if !release(&key, end::CLIENT) {
        release(&proxy_key(netns, &ends), end::PROXY);
    }
}

/// One end is gone; the last takes the entry with it. False if there is no such entry.
#[inline(always)]
fn release(key: &ConnKey, gone: u64) -> bool {
    let Some(entry) = maps::orig_dst(key) else { return false };
    // SAFETY: as in `accepted`.
    let before = unsafe { atomic::fetch_and(&raw mut (*entry).port_and_ends, !gone) };
    if before & !gone & (end::CLIENT | end::PROXY) == 0 {
        maps::remove_orig_dst(key);
    }
    true
}

#[inline(always)]
fn watch_state(ctx: &SockOpsContext) {
    let flags = load!(load_u32, bpf_sock_ops, ctx.ops, bpf_sock_ops_cb_flags) | BPF_SOCK_OPS_STATE_CB_FLAG;
    // Fails only for sockets that are not full ones, which none of the callbacks above has.
    let _full_socket = ctx.set_cb_flags(flags as i32);
}

/// A socket listens: hold it if it is the proxy's.
#[inline(always)]
fn listen(ctx: &SockOpsContext) {
    let netns = maps::netns_cookie(ctx);
    let Some(pod) = maps::pod(netns) else { return };
    let port = load!(load_u32, bpf_sock_ops, ctx.ops, local_port) as u16;
    if port != pod.outbound_port && port != pod.inbound_port {
        return;
    }
    let local = context::callback_local(ctx.ops);
    if port == pod.outbound_port
        && let Some(proxy) = maps::proxy(pod.slot)
    {
        let bound = if local.is_unspecified() { proxy::WILDCARD } else { proxy::ONE };
        let v6 = load!(load_u32, bpf_sock_ops, ctx.ops, family) == AF_INET6;
        // SAFETY: an array element; half a word is written whole.
        unsafe {
            if v6 {
                (*proxy).outbound_v6 = bound;
            } else {
                (*proxy).outbound_v4 = bound;
            }
        }
    }
    // What is bound to loopback would not get arriving connections from a REDIRECT either.
    if !local.is_loopback() && !hold(ctx.ops, netns, port) {
        observe::failure_line!(
            ctx,
            netns,
            pod,
            Failure::ListenerNotAdded,
            "holding a listener of netns {}: it will get no inbound connections"
        );
    }
}

/// Into the first free slot. That none is free is no failure: the port has listeners enough.
#[inline(always)]
fn hold(ops: *mut bpf_sock_ops, netns: u64, port: u16) -> bool {
    const EEXIST: i32 = 17;
    let family = if load!(load_u32, bpf_sock_ops, ops, family) == AF_INET6 { 6 } else { 4 };
    for slot in 0..LISTENER_SLOTS {
        match maps::add_listener(ops, ListenerKey { netns, port, family, slot, reserved: 0 }) {
            Ok(()) => return true,
            Err(error) if error == -EEXIST => {}
            Err(_) => return false,
        }
    }
    true
}
