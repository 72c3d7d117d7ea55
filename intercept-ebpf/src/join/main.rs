//! Joins the connections between proxies of captured pods on one node: what one end sends is put on the other end's
//! queue, past TCP. An object of its own: nothing of it is loaded unless a pod asks for it.
//!
//! Whatever is in doubt goes by TCP, message by message. `docs/acceleration.md` has the conditions and why.
#![expect(clippy::cast_possible_truncation, reason = "the contexts hold ports in words")]
#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(asm_experimental_arch))]

#[path = "../context.rs"]
#[expect(dead_code, unused_imports, reason = "the other object uses the rest")]
mod context;
mod kernel;
mod maps;
mod message;
#[path = "../owner.rs"]
mod owner;
mod pair;
mod proxy;

use aya_ebpf::{
    bindings::sk_action::SK_PASS,
    macros::{sk_msg, sock_ops},
    programs::{SkMsgContext, SockOpsContext},
};

/// Nothing is ever changed for the kernel by this hook.
const CONTINUE: u32 = 1;

#[sock_ops]
fn join_ops(ctx: SockOpsContext) -> u32 {
    pair::callback(&ctx);
    CONTINUE
}

/// `SK_PASS` both for a message that was redirected and for one that goes by TCP; nothing is ever dropped.
#[sk_msg]
fn join_msg(ctx: SkMsgContext) -> u32 {
    message::send(&ctx);
    SK_PASS
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
