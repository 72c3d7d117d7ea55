//! The agent as a library, so that tests can use its parts. The binary is a command line around it.

pub mod acceleration;
mod btf;
pub mod btf_offsets;
pub mod cgroup;
pub mod cni;
pub mod compile;
pub mod confinement;
pub mod containers;
pub mod daemon;
pub mod escape;
pub mod ids;
pub mod listeners;
pub mod maps;
mod netlink;
pub mod netns;
pub mod netns_setup;
pub mod node;
pub mod options;
pub mod ownership;
pub mod programs;
pub mod record;
pub mod routes;
pub mod store;
pub mod support;
pub mod sys;
#[cfg(test)]
mod testing;
pub mod trace;
pub mod userns;
pub mod validation;
