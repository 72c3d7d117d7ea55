//! The testbed: pods made of a network namespace, a cgroup and a veth pair to the outside world, an actor that
//! makes and answers flows in them, istio-iptables' rules as data, and the comparison between the two.
//!
//! Everything here works by system calls and rtnetlink alone, so that it also runs in a virtual machine that
//! holds nothing but these binaries. The only exception is [`iptables`], which needs iptables-restore.

pub mod actor;
pub mod agent;
pub mod api;
pub mod bench;
pub mod bpf;
pub mod cases;
pub mod cri;
pub mod daemon;
pub mod datagram;
pub mod differential;
pub mod envoy;
pub mod iptables;
pub mod joined;
pub mod kernel;
pub mod kube;
pub mod load;
pub mod missing_hook;
pub mod model;
pub mod plugin;
pub mod snapshot;
pub mod soak;
pub mod steps;
pub mod testbed;
pub mod unusual;
