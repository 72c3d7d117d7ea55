//! A cluster of one node: Kubernetes' own programs and containerd in a node of namespaces, the agent as helm installs it
//! from the chart, and pods with Envoy as their sidecar.
//!
//! `cargo xtask cluster` gets the parts. They are of 1.20, which drops a `restartPolicy` of a container: in place of a
//! native sidecar, a pod has its proxy first and the others wait for it, as `holdApplicationUntilProxyStarts` has it.

mod app;
mod documented;
mod ended;
mod image;
mod node;
mod proxy;
pub mod requests;

pub use app::{App, CAPTURED, CLIENTS, NAMESPACE, SERVICE, clients, servers};
pub use documented::DocumentedCommands;
pub use image::APP as APP_IMAGE;
pub use node::{ADDRESS, Cluster, NODE};
pub use proxy::AccessLine;
