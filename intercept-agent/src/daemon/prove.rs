//! Probes a captured pod: whether its connections reach the proxy, and which sockets go around it. Beside the worker, so
//! that a pod that is stuck delays no other, and without the node's lock.

use std::{
    collections::BTreeMap,
    error::Error,
    hash::{BuildHasher as _, RandomState},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use super::{
    capture::AppliedPod,
    report::{PodFailure, ProofReport},
};
use crate::{
    audit::{Audited, ObservedSockets},
    cgroup::CgroupDir,
    confinement::explained,
    escape::OneLine,
    maps::Maps,
    proof::{Probed, ProofCause, ProofState},
    store::Store,
};

/// A probe that takes longer has failed; its thread is given up.
const LONGEST: Duration = Duration::from_secs(60);
/// When a pod is probed after its policy has changed.
const AFTER_CHANGE: Duration = Duration::from_secs(1);
/// First delay after a failure. It doubles, up to the interval.
const FIRST_RETRY: Duration = Duration::from_secs(1);
/// A failure that lasts no longer is not reported: the proxy may be restarting.
const REPORT_AFTER: Duration = Duration::from_secs(5);
/// The same while nothing listens on the proxy's port: it may be starting.
const START_PATIENCE: Duration = Duration::from_secs(60);

/// How pods are probed.
#[derive(Clone, Debug)]
pub struct ProofSettings {
    /// Mount point of bpffs.
    pub bpffs: PathBuf,
    /// Time between two probes of a pod.
    pub interval: Duration,
}

/// What a probe found.
pub struct ProbeResult {
    /// `Err` with the cause and the text of the failure.
    pub proof: Result<ProofState, PodFailure>,
    /// Sockets that go around the proxy, by cause. `None` if they could not be read.
    pub bypasses: Option<BTreeMap<&'static str, usize>>,
}

impl ProbeResult {
    fn unprobed(text: impl Into<String>) -> Self {
        let cause = ProofCause::Unprobed.as_str().to_owned();
        Self { proof: Err(PodFailure { cause, text: text.into() }), bypasses: None }
    }
}

/// Probes a pod on a thread of its own.
pub async fn probe(bpffs: PathBuf, applied: AppliedPod) -> ProbeResult {
    let work = tokio::task::spawn_blocking(move || {
        probe_now(&bpffs, &applied)
            .unwrap_or_else(|error| ProbeResult::unprobed(OneLine(explained(error.as_ref())).to_string()))
    });
    match tokio::time::timeout(LONGEST, work).await {
        Ok(Ok(result)) => result,
        Ok(Err(_)) => ProbeResult::unprobed("the probe panicked; the log says where"),
        Err(_) => ProbeResult::unprobed(format!("the probe did not end within {LONGEST:?}")),
    }
}

fn probe_now(bpffs: &Path, applied: &AppliedPod) -> Result<ProbeResult, Box<dyn Error + Send + Sync>> {
    let store = Store::find(bpffs)?.ok_or("the node has no programs")?;
    let maps = Maps::open(&store.maps())?;
    let policy = maps.policy(applied.cookie)?.ok_or("the pod is not captured any more")?;
    let record = store.read_record(applied.cookie, policy.id)?.ok_or("the pod's record is missing")?;
    if record.config.shadow {
        // Nothing is captured by the programs.
        return Ok(ProbeResult { proof: Ok(ProofState::NothingToProve), bypasses: None });
    }
    let cgroup = CgroupDir::open(&applied.cgroup)?;
    let netns = applied.netns()?.ok_or("nothing leads to the pod's network namespace")?;
    let probed =
        Probed { cgroups: &[&cgroup], netns: &netns, policy: &policy, config: &record.config, maps: &maps };
    let proof = match probed.prove() {
        Ok(proof) => match proof.failure() {
            Some((cause, text)) => Err(PodFailure { cause: cause.as_str().to_owned(), text }),
            None => Ok(proof.state),
        },
        Err(error) => ProbeResult::unprobed(OneLine(explained(&error)).to_string()).proof,
    };
    let audit = |observed: ObservedSockets| {
        maps.look_up(|lookup| {
            let audited = Audited {
                observed: &observed,
                cookie: applied.cookie,
                policy: &policy,
                since: record.since,
                lookup,
                original: &|key| lookup.original(key),
            };
            let mut causes = BTreeMap::new();
            for bypass in audited.audit().bypasses {
                *causes.entry(bypass.cause.as_str()).or_default() += 1;
            }
            causes
        })
    };
    let bypasses = ObservedSockets::of(&[&cgroup], &netns).ok().and_then(|observed| audit(observed).ok());
    Ok(ProbeResult { proof, bypasses })
}

/// The probes of one pod.
#[derive(Debug, Default)]
pub struct ProofRecord {
    next: Option<Instant>,
    in_flight: bool,
    /// The state that the last probe found, unless it failed.
    state: Option<ProofState>,
    /// When it was last proven.
    pub last_proven: Option<Instant>,
    /// The last failure, with the time of the first in a row and their number.
    failing: Option<(PodFailure, Instant, u32)>,
    /// Whether the failure was reported.
    reported: bool,
    /// Sockets around the proxy, by cause.
    pub bypasses: BTreeMap<&'static str, usize>,
}

/// What is to be reported of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProofNews {
    /// It fails for long enough.
    Failed(PodFailure),
    /// It is proven again.
    Recovered,
}

impl ProofRecord {
    /// Its policy is new or has changed.
    pub fn on_change(&mut self, now: Instant) {
        self.next = Some(now + spread(AFTER_CHANGE, 2));
    }

    /// Whether to probe it now. A pod of an earlier daemon is probed at any time within the interval.
    pub fn is_due(&mut self, now: Instant, interval: Duration) -> bool {
        let next = *self.next.get_or_insert_with(|| now + interval.mul_f64(chance()));
        !self.in_flight && next <= now
    }

    /// A probe has begun.
    pub fn begin(&mut self) {
        self.in_flight = true;
        self.next = None;
    }

    /// Whether a probe is in flight.
    pub fn is_in_flight(&self) -> bool {
        self.in_flight
    }

    /// The report on the probes. `None` before the first has ended.
    pub fn report(&self) -> Option<ProofReport> {
        let (state, failure) = self.outcome()?;
        Some(ProofReport {
            state: state.as_str().to_owned(),
            proven_seconds_ago: self.last_proven.map(|proven| proven.elapsed().as_secs()),
            failure: failure.cloned(),
            bypasses: self.bypasses.iter().map(|(cause, count)| ((*cause).to_owned(), *count)).collect(),
        })
    }

    /// A probe has ended.
    pub fn end(&mut self, result: ProbeResult, now: Instant, interval: Duration) -> Option<ProofNews> {
        self.in_flight = false;
        self.bypasses = result.bypasses.unwrap_or_default();
        match result.proof {
            Ok(state) => {
                self.state = Some(state);
                self.failing = None;
                if state == ProofState::Proven {
                    self.last_proven = Some(now);
                }
                // A change while the probe ran has set it.
                self.next.get_or_insert_with(|| now + interval.mul_f64(0.75 + 0.5 * chance()));
                std::mem::take(&mut self.reported).then_some(ProofNews::Recovered)
            }
            Err(failure) => {
                let (since, times) =
                    self.failing.as_ref().map_or((now, 0), |(_, since, times)| (*since, *times));
                let delay = FIRST_RETRY.saturating_mul(1 << times.min(12)).min(interval.max(FIRST_RETRY));
                self.next.get_or_insert_with(|| now + delay.mul_f64(0.75 + 0.5 * chance()));
                let is_starting = failure.cause == ProofCause::NoListener.as_str();
                let patience = if is_starting { START_PATIENCE } else { REPORT_AFTER };
                self.failing = Some((failure.clone(), since, times.saturating_add(1)));
                if self.reported || now.saturating_duration_since(since) < patience {
                    return None;
                }
                self.reported = true;
                Some(ProofNews::Failed(failure))
            }
        }
    }

    /// The failure, if it was reported.
    pub fn reported_failure(&self) -> Option<&PodFailure> {
        self.failing.as_ref().filter(|_| self.reported).map(|(failure, ..)| failure)
    }

    /// The word for it, and the last failure. `None` before the first probe.
    pub fn outcome(&self) -> Option<(ProofState, Option<&PodFailure>)> {
        match (&self.failing, self.state) {
            (Some((failure, ..)), _) => Some((ProofState::Failed, Some(failure))),
            (None, state) => Some((state?, None)),
        }
    }
}

/// `least`, and up to this many seconds more.
fn spread(least: Duration, seconds: u32) -> Duration {
    least + Duration::from_secs(seconds.into()).mul_f64(chance())
}

/// From 0 to 1. A hash with random keys is random enough.
fn chance() -> f64 {
    (RandomState::new().hash_one(0) % 1024) as f64 / 1024.0
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_secs(600);

    fn found(proof: Result<ProofState, &str>) -> ProbeResult {
        let failure = |cause: &str| PodFailure { cause: cause.to_owned(), text: "seen".to_owned() };
        ProbeResult { proof: proof.map_err(failure), bypasses: None }
    }

    #[test]
    fn a_failure_that_lasts_is_reported_once_and_its_end_too() {
        let now = Instant::now();
        let at = |seconds| now + Duration::from_secs(seconds);
        for (cause, last_quiet) in [("not_redirected", 4), ("no_listener", 59)] {
            let mut record = ProofRecord::default();
            assert_eq!(record.end(found(Err(cause)), now, INTERVAL), None, "one is no more than one");
            assert_eq!(record.end(found(Err(cause)), at(last_quiet), INTERVAL), None);
            let news = record.end(found(Err(cause)), at(last_quiet + 1), INTERVAL);
            assert!(matches!(news, Some(ProofNews::Failed(failure)) if failure.cause == cause));
            assert_eq!(record.end(found(Err(cause)), at(last_quiet + 2), INTERVAL), None, "once");
            assert_eq!(record.outcome().map(|(state, _)| state), Some(ProofState::Failed));
            let news = record.end(found(Ok(ProofState::Proven)), at(90), INTERVAL);
            assert_eq!(news, Some(ProofNews::Recovered));
            assert_eq!((record.last_proven, record.reported_failure()), (Some(at(90)), None));
            assert_eq!(record.end(found(Ok(ProofState::Proven)), at(700), INTERVAL), None);
        }
    }

    #[test]
    fn probes_are_spread_over_the_interval_and_follow_a_change_at_once() {
        let now = Instant::now();
        let due_by = |seconds: u64| {
            let is_due = |record: &mut ProofRecord| {
                record.is_due(now, INTERVAL) || record.is_due(now + Duration::from_secs(seconds), INTERVAL)
            };
            (0..200).filter(|_| is_due(&mut ProofRecord::default())).count()
        };
        assert!(due_by(30) < 40 && (40..160).contains(&due_by(300)) && due_by(600) == 200);
        let mut record = ProofRecord::default();
        record.on_change(now);
        assert!(!record.is_due(now, INTERVAL) && record.is_due(now + Duration::from_secs(3), INTERVAL));
        record.begin();
        record.on_change(now);
        assert!(!record.is_due(now + INTERVAL, INTERVAL), "one at a time");
        record.end(found(Ok(ProofState::Proven)), now, INTERVAL);
        assert!(record.is_due(now + Duration::from_secs(3), INTERVAL), "changed while the probe ran");
    }
}
