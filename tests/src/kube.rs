//! The real API of Kubernetes: etcd and kube-apiserver on a node that is a namespace, the daemon with the service
//! account of deploy/intercept.yaml, and pods as the kubelet starts them.
//!
//! `cargo xtask kube` builds the parts. Their version is 1.20, which drops the `restartPolicy` of a container. Native
//! sidecars are tested with recorded answers only.

mod client;
mod pods;
mod server;

pub use client::{Deployed, KubeClient};
pub use pods::{KubePods, NODE, RunningPod, object};
pub use server::{KubeServer, ServerSpec, VARIABLE};
