//! What the reconciler keeps of one pod.

use std::time::Instant;

use serde::{Deserialize, Serialize};
use tokio::{sync::oneshot, task::JoinHandle};

use super::{
    machine::{Intent, MachineCommand, MachineContext, MachineEvent, PodMachine},
    proof::ProofReport,
};
use crate::{
    containers,
    daemon::{
        capture::{AppliedPod, CaptureError},
        cutover::{CutoverProgress, CutoverRecord},
        desired::Key,
        mode::ModeDecision,
        protocol::Refusal,
        prove::ProofRecord,
        retry,
        view::{ClaimError, PodView},
    },
    escape::OneLine,
    ids::NetnsCookie,
    shadow::ShadowRecord,
};

/// How often a pod is observed after one of its containers has started: for five seconds.
const CONTAINER_LOOKS: u8 = 12;

/// The answer to a request for a pod.
pub type PodResult = Result<&'static str, PodFailure>;

/// An error on a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodFailure {
    /// One word.
    pub cause: String,
    /// The error with its causes.
    pub text: String,
}

impl PodFailure {
    /// A refusal, without an attempt.
    pub fn refusal(why: Refusal, text: impl Into<String>) -> Self {
        Self { cause: why.as_str().to_owned(), text: text.into() }
    }

    /// Whether the request was refused for this reason.
    pub fn is(&self, why: Refusal) -> bool {
        self.cause == why.as_str()
    }
}

impl From<&CaptureError> for PodFailure {
    fn from(error: &CaptureError) -> Self {
        Self { cause: error.cause().as_str().to_owned(), text: error.text() }
    }
}

impl From<ClaimError> for PodFailure {
    fn from(error: ClaimError) -> Self {
        let cause = error.cause().as_str().to_owned();
        let (ClaimError::Options(text) | ClaimError::Cgroup(text)) = error;
        Self { cause, text: OneLine(text).to_string() }
    }
}

/// The state of a pod in metrics and `status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PodState {
    /// Desired, and not captured yet.
    Pending,
    /// Captured as desired.
    Captured,
    /// The last attempt failed and is retried. What was applied before still is.
    Failed,
    /// Being released.
    #[serde(rename = "leaving")]
    Releasing,
    /// Ignored: it has no sidecar, or uses the node's network.
    #[serde(rename = "left_alone")]
    Ignored,
}

impl PodState {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Pending, Self::Captured, Self::Failed, Self::Releasing, Self::Ignored];

    /// The word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Captured => "captured",
            Self::Failed => "failed",
            Self::Releasing => "leaving",
            Self::Ignored => "left_alone",
        }
    }
}

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
}

fn send_all(replies: &mut Vec<oneshot::Sender<PodResult>>, answer: &PodResult) {
    for reply in replies.drain(..) {
        // The client may have gone.
        drop(reply.send(answer.clone()));
    }
}

/// The report on a pod, for `status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names are the documentation")]
pub struct PodReport {
    pub pod: String,
    pub name: String,
    pub state: PodState,
    #[serde(rename = "problem")]
    pub failure: Option<PodFailure>,
    pub failures: u32,
    pub left_alone: Option<String>,
    pub netns_cookie: Option<u64>,
    pub cgroup: Option<std::path::PathBuf>,
    pub followed: bool,
    pub earlier_connections: usize,
    #[serde(default)]
    pub links_verified_seconds_ago: Option<u64>,
    #[serde(default)]
    pub proof: Option<ProofReport>,
    #[serde(default)]
    pub cutover: Option<CutoverProgress>,
    #[serde(default)]
    pub mode: Option<ModeDecision>,
}

impl PodReport {
    pub(super) fn of(key: &Key, pod: &TrackedPod) -> Self {
        let applied = pod.applied();
        let desired = match &pod.machine.intent {
            Intent::Desired(desired, _) => Some(&desired.cgroup),
            Intent::Absent | Intent::Awaiting | Intent::Ignored(_) => None,
        };
        Self {
            pod: key.to_string(),
            name: pod.name.clone(),
            state: pod.machine.state(),
            failure: pod.machine.failure.clone(),
            failures: pod.machine.backoff.failures,
            left_alone: pod.machine.ignored().map(|why| why.as_str().to_owned()),
            netns_cookie: applied.map(|applied| applied.cookie.0),
            cgroup: applied.map(|applied| &applied.cgroup).or(desired).cloned(),
            followed: pod.follow.is_some(),
            earlier_connections: pod.preexisting_connections,
            proof: ProofReport::of(&pod.proof),
            cutover: pod.cutover.progress(),
            mode: pod.view.mode().filter(|_| pod.machine.ignored().is_none()).cloned(),
            links_verified_seconds_ago: pod.last_verified.map(|verified| verified.elapsed().as_secs()),
        }
    }
}
