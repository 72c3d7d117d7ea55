//! The real API of Kubernetes: etcd and kube-apiserver on a node that is a namespace, the daemon with a service account
//! as deploy/intercept.yaml gives it one, and pods as the kubelet lays them out.
//!
//! `cargo xtask kube` builds the parts. They are of 1.20, which drops a `restartPolicy` of a container: native sidecars
//! are left to the recorded answers.

mod client;
mod pods;
mod server;

pub use client::{Deployed, KubeClient};
pub use pods::{KubePods, NODE, RunningPod, object};
pub use server::{KubeServer, ServerSpec, VARIABLE};
