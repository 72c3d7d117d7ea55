//! Keeps all pods of a node captured.
//!
//! The sources ([`source`]) say which pods are desired. [`reconcile`] compares them with the applied ones and has the
//! [`worker`] change those. Nothing else changes the node.

pub mod capture;
pub mod cause;
pub mod cutover;
pub mod desired;
pub mod events;
pub mod folder;
mod http;
mod inotify;
pub mod kubernetes;
pub mod mesh;
pub mod metrics;
pub mod mode;
pub mod placement;
pub mod plugin;
pub mod protocol;
pub mod prove;
pub mod ready;
pub mod reconcile;
pub mod report;
pub mod retry;
pub mod serve;
pub mod sidecar;
pub mod socket;
pub mod source;
pub mod takeover;
pub mod view;
pub mod worker;
pub mod workload;
