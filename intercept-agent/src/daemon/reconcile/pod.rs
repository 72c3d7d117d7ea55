//! What the reconciler keeps of one pod.

use std::time::Instant;

use tokio::{sync::oneshot, task::JoinHandle};

use super::machine::{Intent, MachineCommand, MachineContext, MachineEvent, PodMachine};
use crate::{
    containers,
    daemon::{
        capture::AppliedPod,
        cutover::CutoverRecord,
        desired::Key,
        protocol::Refusal,
        prove::ProofRecord,
        report::{PodFailure, PodReport, PodResult},
        retry,
        view::PodView,
    },
    ids::NetnsCookie,
    shadow::ShadowRecord,
};

/// How often a pod is observed after one of its containers has started: for five seconds.
const CONTAINER_LOOKS: u8 = 12;

/// A pod: its machine, the claims on it, and the requests that wait for it.
#[derive(Default)]
pub(super) struct TrackedPod {
    /// The claims of the sources.
    pub(super) view: PodView,
    /// What is desired and what is applied.
    pub(super) machine: PodMachine,
    /// Follows the namespace of this cookie.
    pub(super) follow: Option<(NetnsCookie, JoinHandle<()>)>,
    /// Remaining checks of its ids, if it had no process when its user namespace was read: the first process may not
    /// have entered it yet.
    pub(super) ids_to_confirm: u8,
    /// Its connections are not joined before the self-test has ended.
    pub(super) awaits_self_test: bool,
    /// The cgroups of its containers when it was captured last; `None` if its options name no container.
    containers: Option<Vec<(u64, String)>>,
    /// How often it is still looked at because of a container that has come: its mounts may not have been made yet.
    containers_to_confirm: u8,
    /// When the kernel last reported that its links are in place.
    pub(super) last_verified: Option<Instant>,
    /// Its probes.
    pub(super) proof: ProofRecord,
    /// What shadow mode has found, if it is in that.
    pub(super) shadow: ShadowRecord,
    /// How far its cut-over from iptables is.
    pub(super) cutover: CutoverRecord,
    /// Number of connections from before the capture.
    pub(super) preexisting_connections: usize,
    /// Requests that wait until it is captured or ignored.
    pub(super) waiting: Vec<oneshot::Sender<PodResult>>,
    /// Requests that wait until it is released.
    pub(super) releasing: Vec<oneshot::Sender<PodResult>>,
    /// Its name for logs, kept after the claims have ended.
    pub(super) name: String,
}

impl TrackedPod {
    /// What is applied.
    pub(super) fn applied(&self) -> Option<&AppliedPod> {
        self.machine.phase.applied()
    }

    /// Passes an event to the machine.
    pub(super) fn on(&mut self, event: MachineEvent) -> Vec<MachineCommand> {
        let context = MachineContext {
            now: Instant::now(),
            delay: retry::delay,
            add_waits: !self.waiting.is_empty(),
            delete_waits: !self.releasing.is_empty(),
            has_saved_rules: self.cutover.rules.is_some(),
            stage: self.view.speaker().map(|object| object.stage),
        };
        self.machine.on(event, &context)
    }

    /// Whether its ids have to be read again, because it has a process now.
    pub(super) fn confirms_ids(&mut self) -> bool {
        let confirms = self.ids_to_confirm > 0 && self.applied().is_some_and(AppliedPod::has_processes);
        self.ids_to_confirm -= u8::from(confirms);
        confirms
    }

    /// Remembers which containers there were when it was captured.
    pub(super) fn watch_containers(&mut self, containers: Option<Vec<(u64, String)>>) {
        if self.containers != containers {
            self.containers_to_confirm = CONTAINER_LOOKS;
        }
        self.containers = containers;
    }

    /// Whether a container that the options may name has come or gone, or has come recently.
    pub(super) fn confirms_containers(&mut self) -> bool {
        let (Some(before), Some(applied)) = (&self.containers, self.machine.phase.applied()) else {
            return false;
        };
        let confirms = self.containers_to_confirm > 0;
        self.containers_to_confirm -= u8::from(confirms);
        confirms || *before != containers::fingerprint(&applied.cgroup)
    }

    /// The cookie of the namespace that is followed.
    pub(super) fn followed(&self) -> Option<NetnsCookie> {
        self.follow.as_ref().filter(|(_, task)| !task.is_finished()).map(|(cookie, _)| *cookie)
    }

    /// Stops following its namespace.
    pub(super) fn stop_following(&mut self) {
        if let Some((_, task)) = self.follow.take() {
            task.abort();
        }
    }

    /// Answers `reply` once the pod is captured or ignored. An earlier ADD belongs to another sandbox.
    pub(super) fn wait_for_capture(&mut self, reply: oneshot::Sender<PodResult>) {
        let text = "another sandbox was added for this pod since".to_owned();
        self.answer(&Err(PodFailure::refusal(Refusal::Superseded, text)));
        self.waiting.push(reply);
    }

    /// Answers the requests for the pod.
    pub(super) fn answer(&mut self, answer: &PodResult) {
        send_all(&mut self.waiting, answer);
    }

    /// Answers the requests for its release.
    pub(super) fn answer_released(&mut self, answer: &PodResult) {
        send_all(&mut self.releasing, answer);
    }

    /// The report on it, for `status`.
    pub(super) fn report(&self, key: &Key) -> PodReport {
        let applied = self.applied();
        let desired = match &self.machine.intent {
            Intent::Desired(desired, _) => Some(&desired.cgroup),
            Intent::Absent | Intent::Awaiting | Intent::Ignored(_) => None,
        };
        PodReport {
            pod: key.to_string(),
            name: self.name.clone(),
            state: self.machine.state(),
            failure: self.machine.failure.clone(),
            failures: self.machine.backoff.failures,
            left_alone: self.machine.ignored().map(|why| why.as_str().to_owned()),
            netns_cookie: applied.map(|applied| applied.cookie.0),
            cgroup: applied.map(|applied| &applied.cgroup).or(desired).cloned(),
            followed: self.followed().is_some(),
            earlier_connections: self.preexisting_connections,
            proof: self.proof.report(),
            cutover: self.cutover.progress(),
            mode: self.view.mode().filter(|_| self.machine.ignored().is_none()).cloned(),
            links_verified_seconds_ago: self.last_verified.map(|verified| verified.elapsed().as_secs()),
        }
    }
}

fn send_all(replies: &mut Vec<oneshot::Sender<PodResult>>, answer: &PodResult) {
    for reply in replies.drain(..) {
        // The client may have gone.
        drop(reply.send(answer.clone()));
    }
}
