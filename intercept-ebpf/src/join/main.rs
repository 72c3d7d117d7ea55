//! Joins connections between proxies of captured pods on one node: `sk_msg` moves what one end sends to the receive queue
//! of the other, bypassing TCP. This is an object of its own, loaded for the first pod with `--accelerate`.
//!
//! When in doubt, a message goes by TCP. `docs/acceleration.md` lists the conditions and their reasons.
#![expect(clippy::cast_possible_truncation, reason = "the contexts hold ports in words")]
#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(asm_experimental_arch))]

#[path = "../container.rs"]
#[expect(dead_code, reason = "the other object uses the rest")]
mod container;
#[path = "../context.rs"]
#[expect(dead_code, unused_imports, reason = "the other object uses the rest")]
mod context;
mod kernel;
mod maps;
mod message;
#[path = "../object.rs"]
#[cfg(target_arch = "bpf")]
mod object;
mod observe;
#[path = "../owner.rs"]
mod owner;
mod pair;
mod proxy;
mod short;

use aya_ebpf::{
    bindings::sk_action::SK_PASS,
    macros::{sk_msg, sock_ops},
    programs::{SkMsgContext, SockOpsContext},
};

/// Return value of `sock_ops`, which the kernel ignores for these callbacks.
const CONTINUE: u32 = 1;

#[sock_ops]
fn join_ops(ctx: SockOpsContext) -> u32 {
    pair::callback(&ctx);
    CONTINUE
}

/// Returns `SK_PASS` for redirected messages and for those that go by TCP; no message is dropped.
#[sk_msg]
fn join_msg(ctx: SkMsgContext) -> u32 {
    message::send(&ctx);
    SK_PASS
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
