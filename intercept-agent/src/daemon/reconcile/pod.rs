//! One pod as the daemon sees it.

use std::time::Instant;

use serde::{Deserialize, Serialize};
use tokio::{sync::oneshot, task::JoinHandle};

use crate::daemon::{
    capture::{CaptureError, Held},
    wanted::{Key, Wanted},
};

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
    /// Attempts that failed in a row.
    pub(super) failures: u32,
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
    /// Who waits for it to be in force.
    pub(super) waiting: Vec<oneshot::Sender<Answer>>,
    /// Name for people, kept when nothing is wanted any more.
    pub(super) name: String,
}

impl Pod {
    pub(super) fn state(&self) -> State {
        match (&self.wanted, &self.held, &self.problem) {
            _ if self.left_alone.is_some() => State::LeftAlone,
            (_, _, Some(_)) => State::Failed,
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
        self.name = wanted.name();
        self.left_alone = None;
        self.problem = None;
        self.release_failed = false;
        self.failures = 0;
        self.due = None;
        self.settled = false;
        self.wanted = Some(wanted);
    }

    /// Have somebody wait for what was asked last; who asked before for something else waits in vain.
    pub(super) fn wait(&mut self, reply: oneshot::Sender<Answer>) {
        let problem = Problem {
            cause: "superseded".into(),
            text: "something else was asked for this pod since".into(),
        };
        self.answer(&Err(problem));
        self.waiting.push(reply);
    }

    pub(super) fn answer(&mut self, answer: &Answer) {
        for waiting in self.waiting.drain(..) {
            // Whoever asked may be gone.
            drop(waiting.send(answer.clone()));
        }
    }
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
