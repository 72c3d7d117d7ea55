//! What `check --accelerate` tries on its own connections: everything that one end sends is put on the other end's
//! queue, past TCP. An object of its own, so that nothing of it is loaded for a pod.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

use aya_ebpf::{
    bindings::{sk_action, sk_msg_md},
    macros::{map, sk_msg},
    maps::{Array, SockHash},
    programs::SkMsgContext,
};

/// Ends by their own (local port, remote port); both are addresses of one loopback interface.
#[map]
static PEERS: SockHash<u64> = SockHash::with_max_entries(16, 0);
/// Not 0 while messages go by TCP, on joined connections too.
#[map]
static BY_TCP: Array<u32> = Array::with_max_entries(1, 0);
/// How many messages went this way, so that a check can tell that it looked at joined connections.
#[map]
static JOINED: Array<u64> = Array::with_max_entries(1, 0);

/// A message is sent: `SK_DROP`, seen as EACCES by the sender, if the other end is not there.
#[sk_msg]
fn trial(ctx: SkMsgContext) -> u32 {
    /// `BPF_F_INGRESS`: to the other's receive queue.
    const INGRESS: u64 = 1;
    /// `SK_PASS`, as the helper gives it.
    const PASS: i64 = 1;
    if BY_TCP.get(0).is_some_and(|by_tcp| *by_tcp != 0) {
        return sk_action::SK_PASS;
    }
    if let Some(count) = JOINED.get_ptr_mut(0) {
        // SAFETY: an element of an array map, which outlives the program. A count lost to a race does no harm.
        unsafe { *count += 1 };
    }
    let (local, remote) = ports(ctx.msg);
    match PEERS.redirect_msg(&ctx, u64::from(remote) << 32 | u64::from(local), INGRESS) {
        PASS => sk_action::SK_PASS,
        _ => sk_action::SK_DROP,
    }
}

/// Both in host order.
#[inline(always)]
fn ports(msg: *mut sk_msg_md) -> (u32, u32) {
    // SAFETY: the context of the running program. Volatile, lest LLVM merges the two into one load, which the
    // verifier does not take.
    unsafe {
        let local = core::ptr::read_volatile(&raw const (*msg).local_port);
        let remote = core::ptr::read_volatile(&raw const (*msg).remote_port);
        (local, u32::from_be(remote))
    }
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(not(target_arch = "bpf"))]
fn main() {}
