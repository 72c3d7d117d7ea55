//! The programs. An entry point (`entry.rs`) has the name of its hook, makes one call and translates the verdict into the
//! hook's return value. Everything else is in a module by concern.
#![expect(clippy::cast_possible_truncation, reason = "the contexts hold ports and protocols in words")]
#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(asm_experimental_arch))]

mod atomic;
mod connect;
mod container;
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
#[cfg(target_arch = "bpf")]
mod object;
mod observe;
mod open;
mod original;
mod owner;
mod proxy;
mod refusal;
mod shadow;
mod storage;
mod verdict;
mod verifier;
mod workload;

#[cfg(not(target_arch = "bpf"))]
fn main() {}
