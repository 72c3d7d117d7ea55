//! Whether a pod that is started now would be captured.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use super::{
    capture::CaptureError,
    plugin::InstallerHandle,
    worker::{Priority, Worker},
};
use crate::node::NodeError;

/// Answers for `/readyz` and for the runtime's STATUS.
#[derive(Clone)]
pub struct Readiness {
    /// Runs what changes the node.
    pub worker: Worker,
    /// Whether what an earlier daemon applied is known.
    pub adopted: Arc<AtomicBool>,
    /// Keeps the plugin installed, if this daemon does.
    pub installer: Option<InstallerHandle>,
}

impl Readiness {
    /// Whether this daemon could capture a pod. An error says why not.
    pub async fn of_daemon(&self) -> Result<(), String> {
        if !self.adopted.load(Ordering::Acquire) {
            return Err("taking over what is in force".to_owned());
        }
        let asked = self.worker.run(Priority::Urgent, |access| {
            access.with(|node| Ok::<_, NodeError>(node.maps().policies()?.len()))
        });
        match asked.await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(CaptureError::from(error).text()),
            Err(failed) => Err(failed.to_string()),
        }
    }

    /// Also whether it would be asked to.
    pub async fn of_node(&self) -> Result<(), String> {
        self.of_daemon().await?;
        match self.installer.as_ref().and_then(|installer| installer.state().problem()) {
            Some(problem) => Err(problem),
            None => Ok(()),
        }
    }
}
