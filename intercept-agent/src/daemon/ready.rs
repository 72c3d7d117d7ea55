//! Whether a pod that starts now would be captured.

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

/// Answers `/readyz` and the runtime's STATUS.
#[derive(Clone)]
pub struct Readiness {
    /// Executes changes of the node.
    pub worker: Worker,
    /// Whether the captures of an earlier daemon have been adopted.
    pub adopted: Arc<AtomicBool>,
    /// The installer of the plugin, if this daemon keeps it installed.
    pub installer: Option<InstallerHandle>,
}

impl Readiness {
    /// Whether this daemon can capture a pod. The error says why not.
    pub async fn of_daemon(&self) -> Result<(), String> {
        if !self.adopted.load(Ordering::Acquire) {
            return Err("adopting the active captures".to_owned());
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

    /// As `of_daemon`, and whether new pods use the plugin.
    pub async fn of_node(&self) -> Result<(), String> {
        self.of_daemon().await?;
        match self.installer.as_ref().and_then(|installer| installer.state().problem()) {
            Some(problem) => Err(problem),
            None => Ok(()),
        }
    }
}
