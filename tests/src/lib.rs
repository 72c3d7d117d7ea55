//! Fixtures of the integration tests, and the benchmark.
//!
//! [`testbed`] makes pods, [`actor`] makes and answers flows in them, [`iptables`] has the rules of istio-iptables as
//! data, and [`differential`] compares the two ways of capturing. README.md shows how to run the tests.
//!
//! [`testbed`], [`actor`], [`agent`] and [`cases`] use only system calls and rtnetlink, so that they also run in a virtual
//! machine that has nothing but these binaries.

pub mod actor;
pub mod agent;
pub mod api;
pub mod bench;
pub mod bpf;
pub mod cases;
pub mod cluster;
pub mod cri;
pub mod cutover;
pub mod daemon;
pub mod datagram;
pub mod deadline;
pub mod differential;
pub mod envoy;
pub mod iptables;
pub mod joined;
pub mod kernel;
pub mod kube;
pub mod load;
pub mod machine;
pub mod missing_hook;
pub mod model;
pub mod plugin;
pub mod snapshot;
pub mod soak;
pub mod status;
pub mod steps;
pub mod strace;
pub mod testbed;
pub mod unusual;
