//! Every pod of a node, kept captured.
//!
//! Sources say which pods are wanted ([`folder`], the CNI plugin through [`socket`]); [`reconcile`]
//! alone compares them with what is in force, and has the [`worker`] change it. Nothing else calls the node.

pub mod capture;
pub mod cause;
pub mod desired;
pub mod events;
pub mod folder;
mod http;
mod inotify;
pub mod kubernetes;
pub mod mesh;
pub mod metrics;
pub mod placement;
pub mod plugin;
pub mod protocol;
pub mod ready;
pub mod reconcile;
pub mod retry;
pub mod serve;
pub mod sidecar;
pub mod socket;
pub mod source;
pub mod view;
pub mod worker;
