//! Events, context and commands of a pod's machine.

use std::time::{Duration, Instant};

use crate::daemon::{
    capture::{AppliedPod, CaptureError},
    cause::Cause,
    desired::DesiredPod,
    report::{PodFailure, PodResult},
    sidecar::IgnoreReason,
    view::{Resolution, Stage},
    worker::Priority,
};

/// How long a pod in phase Running may have no process.
pub(super) const RUNNING_PATIENCE: Duration = Duration::from_secs(30);

/// What the machine knows besides its own state.
#[derive(Clone, Copy)]
pub(in crate::daemon::reconcile) struct MachineContext {
    pub(in crate::daemon::reconcile) now: Instant,
    /// The delay after a number of failures.
    pub(in crate::daemon::reconcile) delay: fn(u32) -> Duration,
    /// Whether an ADD waits for the pod.
    pub(in crate::daemon::reconcile) add_waits: bool,
    /// Whether a DEL waits for the pod.
    pub(in crate::daemon::reconcile) delete_waits: bool,
    /// Whether rules of iptables are saved for what is applied.
    pub(in crate::daemon::reconcile) has_saved_rules: bool,
    /// The stage of the pod's API object.
    pub(in crate::daemon::reconcile) stage: Option<Stage>,
}

/// What happened to a pod.
#[derive(Debug)]
pub(in crate::daemon::reconcile) enum MachineEvent {
    /// The claims on it were merged.
    Resolved(Resolution),
    /// The runtime has ended its sandbox.
    SandboxEnded,
    /// An earlier daemon, or a command, applied this.
    Adopted(AppliedPod),
    /// Something may have changed.
    Recheck,
    /// Its namespace changed.
    NamespaceChanged,
    /// The job in flight was so expensive that changes of the namespace are not applied for this long.
    Rest(Duration),
    /// The time of the next attempt has come.
    RetryDue,
    /// Nothing leads to its namespace any more.
    Unreachable,
    /// Its cgroup or its namespace is gone.
    Gone(Aftermath),
    /// The job in flight captured it.
    Captured(AppliedPod),
    /// The job in flight found that a command has detached what a command attached.
    Detached,
    /// The job in flight could not capture it.
    CaptureFailed(FailedAttempt),
    /// The job in flight released it.
    Released,
    /// The job in flight could not release it.
    ReleaseFailed(FailedAttempt),
    /// It still exists, or the kernel could not be asked.
    StillThere,
}

/// Whether a source may ask again for a pod that is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::daemon::reconcile) enum Aftermath {
    Over,
    MayReturn,
}

/// An attempt that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::daemon::reconcile) struct FailedAttempt {
    pub(super) cause: Cause,
    pub(super) failure: PodFailure,
    pub(super) stage: AttemptStage,
}

/// What the failure says of the pod's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::daemon::reconcile) enum AttemptStage {
    /// The pod looks like this while its sandbox is being created.
    MayBeStarting,
    Started,
}

impl From<&CaptureError> for FailedAttempt {
    fn from(error: &CaptureError) -> Self {
        let stage = if error.is_of_a_start() { AttemptStage::MayBeStarting } else { AttemptStage::Started };
        Self { cause: error.cause(), failure: PodFailure::from(error), stage }
    }
}

/// What the reconciler has to do.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::daemon::reconcile) enum MachineCommand {
    /// Capture the pod and report the result as an event.
    Capture { desired: Box<DesiredPod>, before: Option<AppliedPod>, priority: Priority },
    /// Release it and report the result as an event.
    Release { applied: AppliedPod, priority: Priority },
    /// Ask the kernel whether it exists.
    Check(AppliedPod),
    /// Stop following its namespace.
    StopFollowing,
    /// Answer the ADD that waits for it.
    Answer(PodResult),
    /// Answer the DELs that wait for it.
    AnswerReleased(PodResult),
    /// Count a failure.
    CountFailure(Cause),
    /// Log that it is ignored.
    LogIgnored(IgnoreReason),
    /// Log that it has no process yet.
    LogStarting(PodFailure),
    /// Log that an attempt failed.
    LogFailed { failure: PodFailure, failures: u32, retry_in: Duration },
    /// Log that a claim is invalid.
    LogRefused(PodFailure),
    /// Publish an event on it.
    Publish(String),
    /// The ADD failed: the runtime removes the sandbox and creates another.
    EndFailedAdd,
    /// Forget it if no source has a claim on it.
    ForgetIfUnclaimed,
}

impl MachineContext {
    pub(super) fn priority(&self) -> Priority {
        if self.add_waits || self.delete_waits { Priority::Urgent } else { Priority::Normal }
    }

    /// Whether a pod may still have no process after failing for this long. The kubelet creates the cgroup, waits for
    /// volumes, and then has the sandbox created. After that the API reports `Running`; a sandbox that died takes a
    /// while to be replaced.
    pub(super) fn is_starting(&self, age: Duration) -> bool {
        !self.add_waits && self.stage.is_some_and(|stage| stage == Stage::Pending || age < RUNNING_PATIENCE)
    }
}
