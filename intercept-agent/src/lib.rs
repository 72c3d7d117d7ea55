//! The agent as a library, so that tests can look at its parts; the binary is a command line around it.

pub mod acceleration;
pub mod cgroup;
pub mod cni;
pub mod compile;
pub mod confinement;
pub mod daemon;
pub mod escape;
pub mod kernel;
pub mod listeners;
pub mod mirror;
mod netlink;
pub mod netns;
pub mod node;
pub mod offsets;
pub mod options;
pub mod ownership;
pub mod plumbing;
pub mod programs;
pub mod store;
pub mod support;
pub mod tables;
pub mod trace;
pub mod userns;
pub mod validation;
