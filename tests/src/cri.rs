//! Real pods: containerd with its runtime and network plugins, on a node made of namespaces.
//!
//! `cargo xtask cri` downloads the parts and builds the image of the agent.

mod client;
mod image;
mod kubelet;
mod messages;
mod node;

pub use client::{CriClient, PodConfig, PodSandbox, log, uid, wait};
pub use image::{busybox, make_archive};
pub use kubelet::DaemonPod;
pub use node::{CriNode, IMAGE, PODS, PODS_V6, PodNetwork, VARIABLE};
