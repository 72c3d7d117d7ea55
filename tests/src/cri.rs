//! Real pods: containerd with its runtime and its network plugins, on a node that is only namespaces.
//!
//! `cargo xtask cri` gets the parts, and makes the image of the agent.

mod client;
mod image;
mod kubelet;
mod messages;
mod node;

pub use client::{CriClient, PodConfig, PodSandbox, log, uid, wait};
pub use image::{busybox, make_archive};
pub use kubelet::DaemonPod;
pub use node::{CriNode, IMAGE, PODS, PodNetwork, VARIABLE};
