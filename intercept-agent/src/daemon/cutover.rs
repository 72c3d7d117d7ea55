//! Cuts pods over from their rules of iptables and back, beside the worker: the programs of iptables may be slow, and the
//! node is locked only while the policy is switched.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;

use super::{
    capture::{AppliedPod, Liveness},
    report::PodFailure,
    retry,
    takeover::Takeover,
    worker::WorkerFailed,
};
use crate::{
    cgroup::CgroupDir,
    confinement::explained,
    cutover::{self, Caution, CutoverError, CutoverReport, Keeper, RulesState},
    escape::OneLine,
    node::NodeError,
    store::Store,
};

/// Most pods that are cut over at once. A pod whose iptables is slow delays only other pods that are cut over.
const PARALLEL: usize = 4;

/// Cuts pods over.
#[derive(Clone)]
pub struct Cutovers {
    bpffs: PathBuf,
    /// Least number of compared flows.
    min_flows: u64,
    permits: Arc<Semaphore>,
}

/// How an attempt ended.
pub struct CutoverAttempt {
    /// What was done, or why not.
    pub result: Result<CutoverReport, CutoverError>,
    /// The time that it took.
    pub took: Duration,
}

impl Cutovers {
    /// For the state in this bpffs, of pods in which at least `min_flows` flows were compared.
    pub fn new(bpffs: PathBuf, min_flows: u64) -> Self {
        Self { bpffs, min_flows, permits: Arc::new(Semaphore::new(PARALLEL)) }
    }

    /// What must be known of a pod before it is cut over.
    pub fn caution(&self, takeover: Takeover) -> Caution {
        takeover.caution(self.min_flows)
    }

    /// Where the saved rules of a pod are; `None` if it has none.
    pub fn rules(&self, applied: &AppliedPod) -> Result<Option<RulesState>, NodeError> {
        let Some(store) = Store::find(&self.bpffs)? else { return Ok(None) };
        Ok(store.saved_rules(applied.cookie)?.map(|saved| saved.state))
    }

    /// Cuts a pod over.
    pub async fn there(
        &self,
        applied: AppliedPod,
        takeover: Takeover,
    ) -> Result<CutoverAttempt, WorkerFailed> {
        let caution = self.caution(takeover);
        self.run(move |bpffs| cutover::cut_over(&bpffs, &applied.open_cgroup()?, Keeper::Daemon, caution))
            .await
    }

    /// Puts the rules of a pod in again.
    pub async fn back(&self, applied: AppliedPod) -> Result<CutoverAttempt, WorkerFailed> {
        self.run(move |bpffs| cutover::go_back(&bpffs, &applied.open_cgroup()?, Keeper::Daemon)).await
    }

    /// Puts the rules of all these pods in again, as far as they live.
    pub async fn all_back(&self, pods: &[AppliedPod]) {
        // Of those whose rules cannot be read, the attempt tells why.
        let out = pods.iter().filter(|applied| self.is_cut_over(applied).unwrap_or(true));
        let all = out.map(|applied| async {
            let error = match self.back(applied.clone()).await {
                Ok(CutoverAttempt { result: Ok(_), .. }) => return,
                Ok(CutoverAttempt { result: Err(error), .. }) => explained(&error),
                Err(failed) => failed.to_string(),
            };
            tracing::error!(
                cookie = applied.cookie.0,
                "putting the pod's rules of iptables in again, without which nothing captures it: {}",
                OneLine(error)
            );
        });
        join_all(all).await;
    }

    /// Whether a living pod has saved rules, which have to be put in again before the programs leave it.
    pub fn is_cut_over(&self, applied: &AppliedPod) -> Result<bool, NodeError> {
        Ok(applied.liveness() == Liveness::Alive && self.rules(applied)?.is_some())
    }

    async fn run(
        &self,
        work: impl FnOnce(PathBuf) -> Result<CutoverReport, CutoverError> + Send + 'static,
    ) -> Result<CutoverAttempt, WorkerFailed> {
        let _permit = self.permits.acquire().await.map_err(|_| WorkerFailed)?;
        let bpffs = self.bpffs.clone();
        let run = move || {
            let started = Instant::now();
            let result = work(bpffs);
            CutoverAttempt { result, took: started.elapsed() }
        };
        // If it panicked, that was logged.
        tokio::task::spawn_blocking(run).await.map_err(|_| WorkerFailed)
    }
}

impl AppliedPod {
    fn open_cgroup(&self) -> Result<CgroupDir, CutoverError> {
        Ok(CgroupDir::open(&self.cgroup).map_err(NodeError::from)?)
    }
}

/// How far the cut-over of a pod is, for `status` and metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CutoverState {
    /// It is to be cut over, and is compared until enough is known.
    Comparing,
    /// It is to be cut over, and is not: its rules go on to capture it.
    Refused,
    /// An attempt has begun and is not finished: one of the two captures the pod, or both do.
    Unfinished,
    /// The programs capture it, and its rules are out.
    CutOver,
}

impl CutoverState {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Comparing, Self::Refused, Self::Unfinished, Self::CutOver];

    /// The word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Comparing => "comparing",
            Self::Refused => "refused",
            Self::Unfinished => "unfinished",
            Self::CutOver => "cut_over",
        }
    }
}

/// The report on a pod's cut-over, for `status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CutoverProgress {
    /// How far it is.
    pub state: CutoverState,
    /// Why it is not further.
    #[serde(rename = "problem")]
    pub failure: Option<PodFailure>,
}

/// What is known of the cut-over of a pod.
#[derive(Debug, Default)]
pub struct CutoverRecord {
    /// Whether the pod is to be cut over.
    pub takeover: Takeover,
    /// Where its saved rules are, if it has some.
    pub rules: Option<RulesState>,
    /// Whether an attempt is to be made with the next capture.
    is_due: bool,
    failures: u32,
    retry_at: Option<Instant>,
    failure: Option<PodFailure>,
    /// The failure that was said last, without numbers that grow.
    said: Option<String>,
}

impl CutoverRecord {
    /// How far it is; `None` if the pod has nothing to do with rules of iptables.
    pub fn progress(&self) -> Option<CutoverProgress> {
        let state = match (self.rules, self.takeover, &self.failure) {
            (Some(RulesState::Out), ..) => CutoverState::CutOver,
            (Some(_), ..) => CutoverState::Unfinished,
            (None, Takeover::None, _) => return None,
            (None, _, Some(failure)) if failure.cause != CutoverError::COMPARED_TOO_FEW => {
                CutoverState::Refused
            }
            (None, ..) => CutoverState::Comparing,
        };
        Some(CutoverProgress { state, failure: self.failure.clone() })
    }

    /// Whether an attempt is still to be made.
    pub fn is_pending(&self) -> bool {
        self.takeover != Takeover::None && self.rules != Some(RulesState::Out)
    }

    /// Whether an attempt that has begun is to be finished now.
    pub fn is_retry_due(&self, now: Instant) -> bool {
        self.rules.is_some() && self.is_pending() && self.may_try(now)
    }

    /// Whether the last attempt is long enough ago.
    pub fn may_try(&self, now: Instant) -> bool {
        !self.is_due && self.retry_at.is_none_or(|retry_at| retry_at <= now)
    }

    /// An attempt is to be made with the next capture.
    pub fn ask(&mut self) {
        self.is_due = true;
    }

    /// Whether an attempt is to be made with this capture.
    pub fn take_due(&mut self) -> bool {
        std::mem::take(&mut self.is_due) && self.is_pending()
    }

    /// The pod is captured, and this is wanted of it.
    pub fn captured(&mut self, takeover: Takeover, rules: Option<RulesState>) {
        if self.takeover != takeover || rules == Some(RulesState::Out) {
            *self = Self { is_due: self.is_due, ..Self::default() };
        }
        (self.takeover, self.rules) = (takeover, rules);
    }

    /// An attempt has ended well.
    pub fn succeeded(&mut self) {
        (self.failures, self.retry_at, self.failure, self.said) = (0, None, None, None);
    }

    /// An attempt has failed after this time. It is made again later.
    pub fn failed(&mut self, took: Duration) {
        self.failures = self.failures.saturating_add(1);
        // An attempt that takes long is made rarely, whatever the reason.
        self.retry_at = Some(Instant::now() + retry::delay(self.failures).max(took * 10));
    }

    /// Remembers why the pod is not cut over. Returns the failure if it is another than before.
    pub fn refused(&mut self, error: &CutoverError) -> Option<PodFailure> {
        let failure =
            PodFailure { cause: error.cause().to_owned(), text: OneLine(explained(error)).to_string() };
        let said = if error.counts_flows() { failure.cause.clone() } else { failure.text.clone() };
        self.failure = Some(failure.clone());
        (self.said.replace(said.clone()) != Some(said)).then_some(failure)
    }
}
