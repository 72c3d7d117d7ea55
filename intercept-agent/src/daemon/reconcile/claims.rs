//! What sources say becomes what is to be applied.

use std::collections::HashSet;

use tokio::sync::oneshot;

use super::{Answer, Message, Problem, Reconciler};
use crate::daemon::{
    view::{self, ApiWait, Certainty, ObjectUid, PodView, Resolution, SandboxClaim},
    wanted::{Key, Wanted},
};
use crate::escape::OneLine;

impl Reconciler {
    /// Note what a source says of a pod.
    pub(super) fn update(&mut self, key: &Key, change: impl FnOnce(&mut PodView)) {
        if !self.leaving {
            change(&mut self.pods.entry(key.clone()).or_default().view);
            self.reconsider(key);
        }
    }

    /// The same for a source that has no more to say.
    pub(super) fn update_known(&mut self, key: &Key, change: impl FnOnce(&mut PodView)) {
        if let Some(pod) = self.pods.get_mut(key) {
            change(&mut pod.view);
            self.reconsider(key);
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
    pub(super) fn add(&mut self, key: &Key, claim: SandboxClaim, reply: oneshot::Sender<Answer>) {
        if self.leaving {
            let text = "the agent is being removed from this node".to_owned();
            drop(reply.send(Err(Problem { cause: "leaving".into(), text })));
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
            let silent = Message::ApiSilent(key.clone(), sandbox);
            tokio::spawn(async move {
                tokio::time::sleep(patience).await;
                drop(messages.send(silent));
            });
        }
        self.reconsider(key);
    }

    pub(super) fn api_silent(&mut self, key: &Key, sandbox: &str) {
        let Some(pod) = self.pods.get_mut(key) else { return };
        if pod.view.end_api_wait(sandbox) && pod.view.speaker().is_none() {
            tracing::warn!(
                pod = %key, name = pod.name,
                "the API has not told of this pod in time: deciding by its annotations until it does"
            );
            self.reconsider(key);
        }
    }

    /// The runtime takes the sandbox down after a failed ADD, and asks again with another.
    pub(super) fn add_failed(&mut self, key: &Key) {
        let Some(pod) = self.pods.get_mut(key) else { return };
        if pod.held.is_none() && matches!(key, Key::Pod(_)) {
            pod.view.on_gone();
            self.reconsider(key);
        }
    }

    pub(super) fn delete(&mut self, key: &Key, sandbox: &str, reply: oneshot::Sender<Answer>) {
        if let Some(pod) = self.pods.get_mut(key)
            && pod.view.end_sandbox(sandbox)
        {
            if pod.held.is_some() || pod.busy {
                pod.releasing.push(reply);
            } else {
                drop(reply.send(Ok("absent")));
            }
            // Whatever the other sources say, what is applied was of this sandbox.
            pod.unwant();
            self.reconsider(key);
        } else {
            // DEL may be repeated, and may come for what never was: both are fine by the specification.
            drop(reply.send(Ok("absent")));
        }
    }

    /// Compare what the sources say with what is to be applied, and have it applied.
    pub(super) fn reconsider(&mut self, key: &Key) {
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
        pod.undecided = false;
        match pod.view.resolve(uid) {
            Resolution::Capture(wanted) => self.want(key, *wanted),
            Resolution::Ignore(why) => {
                let why = why.as_str();
                if pod.left_alone != Some(why) {
                    tracing::debug!(pod = %key, name = pod.name, why, "left alone");
                }
                pod.unwant();
                pod.left_alone = Some(why);
                self.step(key);
            }
            Resolution::Refuse(problem) => self.refuse(key, problem),
            Resolution::AwaitApi => pod.undecided = true,
            Resolution::Unplaced => {
                pod.unwant();
                pod.undecided = true;
                self.step(key);
            }
            Resolution::Absent => {
                pod.unwant();
                self.step(key);
            }
        }
    }

    fn want(&mut self, key: &Key, wanted: Wanted) {
        let Some(pod) = self.pods.get_mut(key) else { return };
        if pod.waiting.is_empty() && pod.wanted.as_ref() == Some(&wanted) && pod.problem.is_none() {
            return;
        }
        pod.want(wanted);
        self.step(key);
    }

    fn refuse(&mut self, key: &Key, problem: view::Problem) {
        let Some(pod) = self.pods.get_mut(key) else { return };
        let (cause, text) = match problem {
            view::Problem::Options(text) => ("options", text),
            view::Problem::Cgroup(text) => ("cgroup", text),
        };
        let problem = Problem { cause: cause.to_owned(), text: OneLine(text).to_string() };
        let asked = pod.answer(&Err(problem.clone()));
        pod.left_alone = None;
        if pod.held.is_none() {
            // What is applied stays; what is not yet does not begin.
            pod.wanted = None;
            pod.due = None;
        }
        if pod.problem.as_ref() != Some(&problem) {
            self.metrics.error(cause);
            tracing::error!(pod = %key, name = pod.name, cause, "{}", problem.text);
            pod.failures += 1;
            pod.problem = Some(problem);
        }
        self.complain(key);
        if asked {
            self.add_failed(key);
        }
        // Goes on to release what was of an earlier sandbox.
        if self.pods.get(key).is_some_and(|pod| pod.wanted.is_none()) {
            self.step(key);
        }
    }
}
