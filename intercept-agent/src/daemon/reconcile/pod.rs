//! One pod as the daemon sees it.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::{sync::oneshot, task::JoinHandle};

use crate::daemon::{
    capture::{CaptureError, Held},
    view::{PodView, Stage},
    wanted::{Key, Wanted},
};

/// How long a pod that the API calls running may have no process.
const RUNNING_PATIENCE: Duration = Duration::from_secs(30);

/// What is told to whoever asked for a pod, with the text of the error.
pub type Answer = Result<&'static str, Problem>;

/// An error on a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// One word.
    pub cause: String,
    /// The error with its causes.
    pub text: String,
}

impl From<&CaptureError> for Problem {
    fn from(error: &CaptureError) -> Self {
        Self { cause: error.cause().to_owned(), text: error.text() }
    }
}

/// The states of a pod, as metrics and `status` name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It is to be captured, and is not yet.
    Pending,
    /// In force as wanted.
    Captured,
    /// The last attempt failed; what was in force before still is. It will be tried again.
    Failed,
    /// Being taken out of force.
    Leaving,
    /// Not to be captured: no sidecar, or the node's own network.
    LeftAlone,
}

impl State {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Pending, Self::Captured, Self::Failed, Self::Leaving, Self::LeftAlone];

    /// The word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Captured => "captured",
            Self::Failed => "failed",
            Self::Leaving => "leaving",
            Self::LeftAlone => "left_alone",
        }
    }
}

/// A pod.
#[derive(Default)]
pub(super) struct Pod {
    /// What the sources say.
    pub(super) view: PodView,
    /// What is asked; none when it is to go.
    pub(super) wanted: Option<Wanted>,
    /// What is in force.
    pub(super) held: Option<Held>,
    /// Follows the namespace of this cookie.
    pub(super) follow: Option<(u64, JoinHandle<()>)>,
    /// What is in force is what is wanted.
    pub(super) settled: bool,
    /// Why the last attempt failed.
    pub(super) problem: Option<Problem>,
    /// The problem is that of a release, which the next one solves.
    pub(super) release_failed: bool,
    /// What of its problems was last told others, until it is captured.
    pub(super) complained: Option<String>,
    /// Why it is left alone.
    pub(super) left_alone: Option<&'static str>,
    /// It has no place yet, or waits for the API.
    pub(super) undecided: bool,
    /// Attempts that failed in a row.
    pub(super) failures: u32,
    /// When the first of them did.
    pub(super) failing_since: Option<Instant>,
    /// Not to be tried before.
    pub(super) due: Option<Instant>,
    /// The worker has a job for it.
    pub(super) busy: bool,
    /// Something changed meanwhile.
    pub(super) again: bool,
    /// When the kernel last said that its links are in place.
    pub(super) proven: Option<Instant>,
    /// Connections older than the capture.
    pub(super) earlier: usize,
    /// Waiting for it to be captured or ignored.
    pub(super) waiting: Vec<oneshot::Sender<Answer>>,
    /// Waiting for it to be released.
    pub(super) releasing: Vec<oneshot::Sender<Answer>>,
    /// Name for people, kept when nothing is wanted any more.
    pub(super) name: String,
}

impl Pod {
    pub(super) fn state(&self) -> State {
        match (&self.wanted, &self.held, &self.problem) {
            _ if self.left_alone.is_some() => State::LeftAlone,
            (_, _, Some(_)) => State::Failed,
            (None, None, None) if self.undecided => State::Pending,
            (Some(_), Some(_), None) if self.settled => State::Captured,
            (Some(_), _, None) => State::Pending,
            (None, _, None) => State::Leaving,
        }
    }

    /// Let go of its namespace.
    pub(super) fn stop_following(&mut self) {
        if let Some((_, task)) = self.follow.take() {
            task.abort();
        }
    }

    pub(super) fn want(&mut self, wanted: Wanted) {
        self.left_alone = None;
        self.problem = None;
        self.release_failed = false;
        self.failures = 0;
        self.due = None;
        self.settled = false;
        self.wanted = Some(wanted);
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
    pub(super) fn unwant(&mut self) {
        self.wanted = None;
        self.left_alone = None;
        self.problem = None;
        self.failing_since = None;
        self.due = None;
    }

    /// Answer `reply` once the pod is captured, or ignored. An earlier ADD is of another sandbox.
    pub(super) fn wait_for_capture(&mut self, reply: oneshot::Sender<Answer>) {
        let text = "another sandbox was added for this pod since".to_owned();
        self.answer(&Err(Problem { cause: "superseded".into(), text }));
        self.waiting.push(reply);
    }

    /// Answer those who asked for the pod. False if there are none.
    pub(super) fn answer(&mut self, answer: &Answer) -> bool {
        send_all(&mut self.waiting, answer)
    }

    /// Answer those who asked for its release.
    pub(super) fn answer_released(&mut self, answer: &Answer) {
        send_all(&mut self.releasing, answer);
    }
}

fn send_all(replies: &mut Vec<oneshot::Sender<Answer>>, answer: &Answer) -> bool {
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
pub struct Report {
    pub pod: String,
    pub name: String,
    pub state: State,
    pub problem: Option<Problem>,
    pub failures: u32,
    pub left_alone: Option<String>,
    pub netns_cookie: Option<u64>,
    pub cgroup: Option<std::path::PathBuf>,
    pub followed: bool,
    pub earlier_connections: usize,
    #[serde(default)]
    pub proven_seconds_ago: Option<u64>,
}

impl Report {
    pub(super) fn of(key: &Key, pod: &Pod) -> Self {
        Self {
            pod: key.to_string(),
            name: pod.name.clone(),
            state: pod.state(),
            problem: pod.problem.clone(),
            failures: pod.failures,
            left_alone: pod.left_alone.map(str::to_owned),
            netns_cookie: pod.held.as_ref().map(|held| held.cookie),
            cgroup: pod
                .held
                .as_ref()
                .map(|held| held.cgroup.clone())
                .or_else(|| pod.wanted.as_ref().map(|wanted| wanted.cgroup.clone())),
            followed: pod.follow.is_some(),
            earlier_connections: pod.earlier,
            proven_seconds_ago: pod.proven.map(|proven| proven.elapsed().as_secs()),
        }
    }
}
