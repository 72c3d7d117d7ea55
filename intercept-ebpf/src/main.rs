//! The programs. An entry point is its hook's name, one call and the translation of the outcome into what the
//! hook understands; everything else is in the module of its concern.
#![expect(clippy::cast_possible_truncation, reason = "the contexts hold ports and protocols in words")]
#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(asm_experimental_arch))]

mod atomic;
mod connect;
mod context;
mod datagram;
mod entry;
mod handshake;
mod inbound;
mod lifecycle;
mod listeners;
mod lookup;
mod maps;
mod mptcp;
mod observe;
mod open;
mod original;
mod owner;
mod proxy;
mod refusal;

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

/// Some helpers are for programs under a licence that is compatible with the GPL.
#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(not(target_arch = "bpf"))]
fn main() {}
