//! What the daemon says of its pods: the answers to requests, and the reports for `status` and metrics.

use std::{collections::BTreeMap, path::PathBuf};

use serde::{Deserialize, Serialize};

use super::{
    capture::CaptureError, cutover::CutoverProgress, mode::ModeDecision, protocol::Refusal, view::ClaimError,
};
use crate::escape::OneLine;

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
    pub cgroup: Option<PathBuf>,
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

/// The report on a pod's probes, for `status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names are the documentation")]
pub struct ProofReport {
    pub state: String,
    pub proven_seconds_ago: Option<u64>,
    #[serde(rename = "problem")]
    pub failure: Option<PodFailure>,
    pub bypasses: BTreeMap<String, usize>,
}
