//! Takes the claims of the sources to the machines of their pods.

use std::collections::HashSet;

use tokio::sync::oneshot;

use super::{Message, Reconciler, machine::MachineEvent, pod::TrackedPod};
use crate::daemon::{
    desired::Key,
    protocol::Refusal,
    report::{PodFailure, PodResult},
    view::{ApiWait, Certainty, ObjectUid, PodView, SandboxClaim},
};
use crate::ids::PodUid;

impl Reconciler {
    /// Stores a source's claim on a pod.
    pub(super) fn update(&mut self, key: &Key, change: impl FnOnce(&mut PodView)) {
        if !self.uninstalling {
            change(&mut self.pods.entry(key.clone()).or_default().view);
            self.resolve_claims(key);
        }
    }

    /// As above, for a source that ends its claim.
    pub(super) fn update_known(&mut self, key: &Key, change: impl FnOnce(&mut PodView)) {
        if let Some(pod) = self.pods.get_mut(key) {
            change(&mut pod.view);
            self.resolve_claims(key);
        }
    }

    pub(super) fn files_listed(&mut self, listed: &HashSet<Key>) {
        let files = self.pods.keys().filter(|key| matches!(key, Key::File(_)));
        let gone: Vec<Key> = files.filter(|key| !listed.contains(key)).cloned().collect();
        for key in gone {
            tracing::info!(pod = %key, "its file is gone");
            self.update_known(&key, PodView::remove_file);
        }
    }

    pub(super) fn objects_listed(&mut self, listed: &HashSet<ObjectUid>) {
        let pods = self.pods.keys().filter(|key| matches!(key, Key::Pod(_)));
        for key in pods.cloned().collect::<Vec<_>>() {
            self.update_known(&key, |view| view.retain_objects(listed));
        }
    }

    /// The runtime has created a sandbox for a pod and waits until the pod is captured or ignored.
    pub(super) fn add(&mut self, key: &Key, claim: SandboxClaim, reply: oneshot::Sender<PodResult>) {
        if self.uninstalling {
            let text = "the agent is being removed from this node".to_owned();
            drop(reply.send(Err(PodFailure::refusal(Refusal::Leaving, text))));
            return;
        }
        let pod = self.pods.entry(key.clone()).or_default();
        pod.wait_for_capture(reply);
        let sandbox = claim.id.clone();
        let wait = match (self.api_wait, claim.certainty) {
            (Some(_), Certainty::Provisional) => ApiWait::Running,
            _ => ApiWait::Over,
        };
        pod.view.set_sandbox(claim, wait);
        if let (Some(patience), ApiWait::Running, None) = (self.api_wait, wait, pod.view.speaker()) {
            let messages = self.messages.clone();
            let silent = Message::ApiTimeout(key.clone(), sandbox);
            tokio::spawn(async move {
                tokio::time::sleep(patience).await;
                drop(messages.send(silent));
            });
        }
        self.resolve_claims(key);
    }

    pub(super) fn api_timeout(&mut self, key: &Key, sandbox: &str) {
        let Some(pod) = self.pods.get_mut(key) else { return };
        if pod.view.end_api_wait(sandbox) && pod.view.speaker().is_none() {
            tracing::warn!(
                pod = %key, name = pod.name,
                "the API has not reported this pod in time; its annotations decide until it does"
            );
            self.resolve_claims(key);
        }
    }

    /// After a failed ADD the runtime removes the sandbox and creates another.
    pub(super) fn end_failed_add(&mut self, key: &Key) {
        let Some(pod) = self.pods.get_mut(key) else { return };
        if pod.applied().is_none() && matches!(key, Key::Pod(_)) {
            pod.view.on_gone();
            self.resolve_claims(key);
        }
    }

    pub(super) fn delete(&mut self, key: &Key, sandbox: &str, reply: oneshot::Sender<PodResult>) {
        if let Some(pod) = self.pods.get_mut(key)
            && pod.view.end_sandbox(sandbox)
        {
            if pod.applied().is_some() || pod.machine.phase.is_in_flight() {
                pod.releasing.push(reply);
            } else {
                drop(reply.send(Ok("absent")));
            }
            // The applied pod belongs to this sandbox, whatever other sources claim.
            self.on(key, MachineEvent::SandboxEnded);
            self.resolve_claims(key);
        } else {
            // The specification allows a repeated DEL, and one without an ADD.
            drop(reply.send(Ok("absent")));
        }
    }

    /// Releases pods whose sandbox is gone without a DEL. A pod with a waiting ADD may be newer than the list.
    pub(super) fn collect(&mut self, valid: &HashSet<String>) -> usize {
        let is_gone = |pod: &TrackedPod| {
            let sandbox = pod.view.sandbox_id();
            sandbox.is_some_and(|sandbox| !valid.contains(sandbox)) && pod.waiting.is_empty()
        };
        let gone: Vec<Key> =
            self.pods.iter().filter(|(_, pod)| is_gone(pod)).map(|(key, _)| key.clone()).collect();
        for key in &gone {
            tracing::info!(pod = %key, "its sandbox is gone");
            if let Some(pod) = self.pods.get_mut(key)
                && let Some(sandbox) = pod.view.sandbox_id().map(str::to_owned)
            {
                pod.view.end_sandbox(&sandbox);
                self.on(key, MachineEvent::SandboxEnded);
                self.resolve_claims(key);
            }
        }
        gone.len()
    }

    /// Merges the claims on a pod and passes the result to its machine.
    pub(super) fn resolve_claims(&mut self, key: &Key) {
        let Some(pod) = self.pods.get_mut(key) else { return };
        let uid = match key {
            Key::Pod(uid) => uid.clone(),
            Key::File(_) | Key::Command(_) => PodUid::default(),
        };
        if let Some(name) = pod.view.name() {
            pod.name = name;
        } else if let (Key::File(file), true) = (key, pod.name.is_empty()) {
            pod.name.clone_from(file);
        }
        let resolution = pod.view.resolve(&uid);
        self.on(key, MachineEvent::Resolved(resolution));
    }
}
