//! One pod as the daemon sees it.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::{sync::oneshot, task::JoinHandle};

use crate::daemon::{
    capture::{AppliedPod, CaptureError},
    desired::{DesiredPod, Key},
    view::{PodView, Stage},
};

/// How long a pod that the API calls running may have no process.
const RUNNING_PATIENCE: Duration = Duration::from_secs(30);

/// What is told to whoever asked for a pod, with the text of the error.
pub type PodResult = Result<&'static str, PodFailure>;

/// An error on a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodFailure {
    /// One word.
    pub cause: String,
    /// The error with its causes.
    pub text: String,
}

impl From<&CaptureError> for PodFailure {
    fn from(error: &CaptureError) -> Self {
        Self { cause: error.cause().to_owned(), text: error.text() }
    }
}

/// The states of a pod, as metrics and `status` name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PodState {
    /// It is to be captured, and is not yet.
    Pending,
    /// In force as wanted.
    Captured,
    /// The last attempt failed; what was in force before still is. It will be tried again.
    Failed,
    /// Being taken out of force.
    #[serde(rename = "leaving")]
    Releasing,
    /// Not to be captured: no sidecar, or the node's own network.
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

/// A pod.
#[derive(Default)]
pub(super) struct Pod {
    /// What the sources say.
    pub(super) view: PodView,
    /// What is asked; none when it is to go.
    pub(super) desired: Option<DesiredPod>,
    /// What is in force.
    pub(super) applied: Option<AppliedPod>,
    /// Follows the namespace of this cookie.
    pub(super) follow: Option<(u64, JoinHandle<()>)>,
    /// What is in force is what is wanted.
    pub(super) up_to_date: bool,
    /// Why the last attempt failed.
    pub(super) failure: Option<PodFailure>,
    /// The problem is that of a release, which the next one solves.
    pub(super) release_failed: bool,
    /// What of its problems was last told others, until it is captured.
    pub(super) last_event: Option<String>,
    /// Why it is left alone.
    pub(super) ignored: Option<&'static str>,
    /// It has no place yet, or waits for the API.
    pub(super) awaiting_decision: bool,
    /// Attempts that failed in a row.
    pub(super) failures: u32,
    /// When the first of them did.
    pub(super) failing_since: Option<Instant>,
    /// Not to be tried before.
    pub(super) retry_at: Option<Instant>,
    /// Its namespace changed while the worker had a job for it.
    pub(super) changed_in_flight: bool,
    /// Changes of its namespace are not applied before.
    pub(super) rest_until: Option<Instant>,
    /// How often it is looked at again because nothing ran in it when its user namespace was looked at: the first process
    /// may still be outside of that.
    pub(super) ids_to_confirm: u8,
    /// The worker has a job for it.
    pub(super) in_flight: bool,
    /// Something changed meanwhile.
    pub(super) dirty: bool,
    /// When the kernel last said that its links are in place.
    pub(super) last_verified: Option<Instant>,
    /// Connections older than the capture.
    pub(super) preexisting_connections: usize,
    /// Waiting for it to be captured or ignored.
    pub(super) waiting: Vec<oneshot::Sender<PodResult>>,
    /// Waiting for it to be released.
    pub(super) releasing: Vec<oneshot::Sender<PodResult>>,
    /// Name for people, kept when nothing is wanted any more.
    pub(super) name: String,
}

impl Pod {
    pub(super) fn state(&self) -> PodState {
        match (&self.desired, &self.applied, &self.failure) {
            _ if self.ignored.is_some() => PodState::Ignored,
            (_, _, Some(_)) => PodState::Failed,
            (None, None, None) if self.awaiting_decision => PodState::Pending,
            (Some(_), Some(_), None) if self.up_to_date => PodState::Captured,
            (Some(_), _, None) => PodState::Pending,
            (None, _, None) => PodState::Releasing,
        }
    }

    /// Note a change of its namespace. True if it is to be applied at once.
    pub(super) fn changed(&mut self) -> bool {
        if self.in_flight {
            self.changed_in_flight = true;
            return false;
        }
        match self.rest_until.filter(|until| *until > Instant::now()) {
            Some(until) => {
                self.retry_at = Some(self.retry_at.map_or(until, |at| at.max(until)));
                false
            }
            None => true,
        }
    }

    /// Whether its ids are to be looked at again, because something runs in it now.
    pub(super) fn confirms_ids(&mut self) -> bool {
        let confirms =
            self.ids_to_confirm > 0 && self.applied.as_ref().is_some_and(AppliedPod::has_processes);
        self.ids_to_confirm -= u8::from(confirms);
        confirms
    }

    /// Let go of its namespace.
    pub(super) fn stop_following(&mut self) {
        if let Some((_, task)) = self.follow.take() {
            task.abort();
        }
    }

    pub(super) fn set_desired(&mut self, desired: DesiredPod) {
        self.ignored = None;
        self.failure = None;
        self.release_failed = false;
        self.failures = 0;
        self.retry_at = None;
        self.up_to_date = false;
        self.desired = Some(desired);
    }

    /// Whether it may be without a process of its own yet: the kubelet makes the cgroup, then waits for volumes, then
    /// has the sandbox made. The API says `Running` when that is over; a sandbox that died takes a while to be replaced.
    pub(super) fn is_starting(&self, failing_since: Instant) -> bool {
        self.waiting.is_empty()
            && self.view.speaker().is_some_and(|object| {
                object.stage == Stage::Pending || failing_since.elapsed() < RUNNING_PATIENCE
            })
    }

    /// Nothing is asked for it.
    pub(super) fn clear_desired(&mut self) {
        self.desired = None;
        self.ignored = None;
        self.failure = None;
        self.failing_since = None;
        self.retry_at = None;
    }

    /// Answer `reply` once the pod is captured, or ignored. An earlier ADD is of another sandbox.
    pub(super) fn wait_for_capture(&mut self, reply: oneshot::Sender<PodResult>) {
        let text = "another sandbox was added for this pod since".to_owned();
        self.answer(&Err(PodFailure { cause: "superseded".into(), text }));
        self.waiting.push(reply);
    }

    /// Answer those who asked for the pod. False if there are none.
    pub(super) fn answer(&mut self, answer: &PodResult) -> bool {
        send_all(&mut self.waiting, answer)
    }

    /// Answer those who asked for its release.
    pub(super) fn answer_released(&mut self, answer: &PodResult) {
        send_all(&mut self.releasing, answer);
    }
}

fn send_all(replies: &mut Vec<oneshot::Sender<PodResult>>, answer: &PodResult) -> bool {
    let any = !replies.is_empty();
    for reply in replies.drain(..) {
        // The other side may be gone.
        drop(reply.send(answer.clone()));
    }
    any
}

/// One pod for `status` and for tests.
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
    pub proven_seconds_ago: Option<u64>,
}

impl PodReport {
    pub(super) fn of(key: &Key, pod: &Pod) -> Self {
        Self {
            pod: key.to_string(),
            name: pod.name.clone(),
            state: pod.state(),
            failure: pod.failure.clone(),
            failures: pod.failures,
            left_alone: pod.ignored.map(str::to_owned),
            netns_cookie: pod.applied.as_ref().map(|applied| applied.cookie),
            cgroup: pod
                .applied
                .as_ref()
                .map(|applied| applied.cgroup.clone())
                .or_else(|| pod.desired.as_ref().map(|desired| desired.cgroup.clone())),
            followed: pod.follow.is_some(),
            earlier_connections: pod.preexisting_connections,
            proven_seconds_ago: pod.last_verified.map(|proven| proven.elapsed().as_secs()),
        }
    }
}
