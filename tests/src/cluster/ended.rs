//! Removal of containers that have ended.
//!
//! Kubelet 1.20 reports that a pod has ended once its containers are removed. If two of its events arrive together, it
//! leaves that to a collection that runs once a minute. So it does if a container is removed before its end was seen ("could
//! not be located"). An upgrade of the DaemonSet then takes a minute, although the agent has ended within two seconds.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::Result;
use serde_json::{Value, json};

use super::Cluster;
use crate::{cri::CriClient, kube::KubeClient};

impl Cluster {
    /// Runs something while the ended containers of deleted pods are removed at once.
    pub fn removing_ended<T>(&self, run: impl FnOnce() -> T) -> T {
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            let remover = scope.spawn(|| self.remove_until(&over));
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
            over.store(true, Ordering::Relaxed);
            let removed = remover.join();
            let result = result.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            removed.expect("no panic").expect("clients");
            result
        })
    }

    fn remove_until(&self, over: &AtomicBool) -> Result<()> {
        let api = KubeClient::connect(self.server())?;
        let runtime = CriClient::connect(&self.node().socket())?;
        while !over.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(500));
            // A test may have stopped the API.
            for pod in api.list(&json!({ "apiVersion": "v1", "kind": "Pod" })).unwrap_or_default() {
                for id in ended(&pod) {
                    // Kubelet removes most of them itself.
                    drop(runtime.remove_container(id));
                }
            }
        }
        Ok(())
    }
}

/// The ids of a deleted pod's containers that have ended.
fn ended(pod: &Value) -> impl Iterator<Item = &str> {
    let deleted = !pod["metadata"]["deletionTimestamp"].is_null();
    let statuses = ["initContainerStatuses", "containerStatuses"];
    let containers = statuses.into_iter().flat_map(|name| pod["status"][name].as_array()).flatten();
    let ended = containers.filter(move |one| deleted && one["state"]["terminated"].is_object());
    ended.filter_map(|one| one["containerID"].as_str()?.strip_prefix("containerd://"))
}
