//! The program that `check --accelerate` tries on its own connections: every message is redirected to the peer's receive
//! queue. It is an object of its own and never loaded for a pod.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[path = "object.rs"]
#[cfg(target_arch = "bpf")]
mod object;

use aya_ebpf::{
    bindings::{sk_action, sk_msg_md},
    macros::{map, sk_msg},
    maps::{Array, SockHash},
    programs::SkMsgContext,
};

/// Ends by (remote port, local port); both addresses are on one loopback interface.
#[map]
static PEERS: SockHash<u64> = SockHash::with_max_entries(16, 0);
/// Nonzero while messages go by TCP, also on joined connections.
#[map]
static BY_TCP: Array<u32> = Array::with_max_entries(1, 0);
/// Number of redirected messages: shows that a check examined joined connections.
#[map]
static JOINED: Array<u64> = Array::with_max_entries(1, 0);

/// Redirects a message. `SK_DROP`, which the sender sees as EACCES, if there is no peer.
#[sk_msg]
fn trial(ctx: SkMsgContext) -> u32 {
    /// `BPF_F_INGRESS`: to the peer's receive queue.
    const INGRESS: u64 = 1;
    /// `SK_PASS`, as the helper returns it.
    const PASS: i64 = 1;
    if BY_TCP.get(0).is_some_and(|by_tcp| *by_tcp != 0) {
        return sk_action::SK_PASS;
    }
    if let Some(count) = JOINED.get_ptr_mut(0) {
        // SAFETY: an element of an array map, which is never freed. A race can lose a count.
        unsafe { *count += 1 };
    }
    let (local, remote) = ports(ctx.msg);
    match PEERS.redirect_msg(&ctx, u64::from(remote) << 32 | u64::from(local), INGRESS) {
        PASS => sk_action::SK_PASS,
        _ => sk_action::SK_DROP,
    }
}

/// Local and remote port, in host order.
#[inline(always)]
fn ports(msg: *mut sk_msg_md) -> (u32, u32) {
    // SAFETY: the context of the running program. Volatile, because the verifier rejects the single load that LLVM would
    // merge the two into.
    unsafe {
        let local = core::ptr::read_volatile(&raw const (*msg).local_port);
        let remote = core::ptr::read_volatile(&raw const (*msg).remote_port);
        (local, u32::from_be(remote))
    }
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
