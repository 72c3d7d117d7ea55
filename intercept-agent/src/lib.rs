//! The agent. The binary is [`main`]; tests use [`facade`].
#![expect(
    unreachable_pub,
    reason = "an item is pub where other modules use it; facade.rs says what leaves the crate"
)]

mod acceleration;
mod audit;
mod btf;
mod btf_offsets;
mod cgroup;
mod cli;
mod cni;
mod commands;
mod compile;
mod confinement;
mod containers;
mod cutover;
mod daemon;
mod escape;
pub mod facade;
mod ids;
mod listeners;
mod loader;
mod maps;
mod netlink;
mod netns;
mod netns_setup;
mod node;
mod objects;
mod options;
mod ownership;
mod pod_process;
mod programs;
mod proof;
mod record;
mod routes;
mod shadow;
mod sockets;
mod store;
mod support;
mod sys;
#[cfg(test)]
mod testing;
mod trace;
mod userns;
mod validation;

pub use commands::main;
