//! What sources say becomes what is to be applied.

use std::collections::HashSet;

use tokio::sync::oneshot;

use super::{Message, PodFailure, PodResult, Reconciler};
use crate::daemon::{
    desired::{DesiredPod, Key},
    view::{self, ApiWait, Certainty, ObjectUid, PodView, Resolution, SandboxClaim},
};
use crate::escape::OneLine;

impl Reconciler {
    /// Note what a source says of a pod.
    pub(super) fn update(&mut self, key: &Key, change: impl FnOnce(&mut PodView)) {
        if !self.uninstalling {
            change(&mut self.pods.entry(key.clone()).or_default().view);
            self.resolve_claims(key);
        }
    }

    /// The same for a source that has no more to say.
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

    /// The runtime has a sandbox for a pod, and waits until the pod is as it should be.
    pub(super) fn add(&mut self, key: &Key, claim: SandboxClaim, reply: oneshot::Sender<PodResult>) {
        if self.uninstalling {
            let text = "the agent is being removed from this node".to_owned();
            drop(reply.send(Err(PodFailure { cause: "leaving".into(), text })));
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
                "the API has not told of this pod in time: deciding by its annotations until it does"
            );
            self.resolve_claims(key);
        }
    }

    /// The runtime takes the sandbox down after a failed ADD, and asks again with another.
    pub(super) fn add_failed(&mut self, key: &Key) {
        let Some(pod) = self.pods.get_mut(key) else { return };
        if pod.applied.is_none() && matches!(key, Key::Pod(_)) {
            pod.view.on_gone();
            self.resolve_claims(key);
        }
    }

    pub(super) fn delete(&mut self, key: &Key, sandbox: &str, reply: oneshot::Sender<PodResult>) {
        if let Some(pod) = self.pods.get_mut(key)
            && pod.view.end_sandbox(sandbox)
        {
            if pod.applied.is_some() || pod.in_flight {
                pod.releasing.push(reply);
            } else {
                drop(reply.send(Ok("absent")));
            }
            // Whatever the other sources say, what is applied was of this sandbox.
            pod.clear_desired();
            self.resolve_claims(key);
        } else {
            // DEL may be repeated, and may come for what never was: both are fine by the specification.
            drop(reply.send(Ok("absent")));
        }
    }

    /// Compare what the sources say with what is to be applied, and have it applied.
    pub(super) fn resolve_claims(&mut self, key: &Key) {
        let Some(pod) = self.pods.get_mut(key) else { return };
        let uid = match key {
            Key::Pod(uid) => uid.as_str(),
            Key::File(_) | Key::Command(_) => "",
        };
        if let Some(name) = pod.view.name() {
            pod.name = name;
        } else if let (Key::File(file), true) = (key, pod.name.is_empty()) {
            pod.name.clone_from(file);
        }
        pod.awaiting_decision = false;
        match pod.view.resolve(uid) {
            Resolution::Capture(desired) => self.set_desired(key, *desired),
            Resolution::Ignore(why) => {
                let why = why.as_str();
                if pod.ignored != Some(why) {
                    tracing::debug!(pod = %key, name = pod.name, why, "left alone");
                }
                pod.clear_desired();
                pod.ignored = Some(why);
                self.reconcile(key);
            }
            Resolution::Refuse(problem) => self.refuse(key, problem),
            Resolution::AwaitApi => pod.awaiting_decision = true,
            Resolution::Unplaced => {
                pod.clear_desired();
                pod.awaiting_decision = true;
                self.reconcile(key);
            }
            Resolution::Absent => {
                pod.clear_desired();
                self.reconcile(key);
            }
        }
    }

    fn set_desired(&mut self, key: &Key, desired: DesiredPod) {
        let Some(pod) = self.pods.get_mut(key) else { return };
        if pod.waiting.is_empty() && pod.desired.as_ref() == Some(&desired) && pod.failure.is_none() {
            return;
        }
        pod.set_desired(desired);
        self.reconcile(key);
    }

    fn refuse(&mut self, key: &Key, problem: view::ClaimError) {
        let Some(pod) = self.pods.get_mut(key) else { return };
        let (cause, text) = match problem {
            view::ClaimError::Options(text) => ("options", text),
            view::ClaimError::Cgroup(text) => ("cgroup", text),
        };
        let problem = PodFailure { cause: cause.to_owned(), text: OneLine(text).to_string() };
        let asked = pod.answer(&Err(problem.clone()));
        pod.ignored = None;
        if pod.applied.is_none() {
            // What is applied stays; what is not yet does not begin.
            pod.desired = None;
            pod.retry_at = None;
        }
        if pod.failure.as_ref() != Some(&problem) {
            self.metrics.error(cause);
            tracing::error!(pod = %key, name = pod.name, cause, "{}", problem.text);
            pod.failures += 1;
            pod.failure = Some(problem);
        }
        self.publish_event(key);
        if asked {
            self.add_failed(key);
        }
        // Goes on to release what was of an earlier sandbox.
        if self.pods.get(key).is_some_and(|pod| pod.desired.is_none()) {
            self.reconcile(key);
        }
    }
}
