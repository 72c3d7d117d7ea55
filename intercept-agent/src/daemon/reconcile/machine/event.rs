//! What the machine of a pod is told, what it has to know, and what it commands.

use std::time::{Duration, Instant};

use crate::daemon::{
    capture::{AppliedPod, CaptureError},
    cause::Cause,
    desired::DesiredPod,
    reconcile::{PodFailure, PodResult},
    sidecar::IgnoreReason,
    view::{Resolution, Stage},
    worker::Priority,
};

/// How long a pod that the API calls running may have no process.
pub(super) const RUNNING_PATIENCE: Duration = Duration::from_secs(30);

/// What the machine has to know besides its own state.
#[derive(Clone, Copy)]
pub(in crate::daemon::reconcile) struct MachineContext {
    pub(in crate::daemon::reconcile) now: Instant,
    /// How long to wait after so many failures.
    pub(in crate::daemon::reconcile) delay: fn(u32) -> Duration,
    /// Whether an ADD waits for the pod.
    pub(in crate::daemon::reconcile) add_waits: bool,
    /// Whether a DEL waits for the pod.
    pub(in crate::daemon::reconcile) delete_waits: bool,
    /// Where the object of the API that speaks for the pod is in its life.
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
    /// The job in flight took so much of the worker that changes of the namespace are not applied for this long.
    Rest(Duration),
    /// Its time to be tried again has come.
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
    /// The kernel says that it is still there, or does not say.
    StillThere,
}

/// Whether a source may want a pod again whose place is gone.
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

/// What the loop has to do.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::daemon::reconcile) enum MachineCommand {
    /// Have the pod captured, and say what became of it.
    Capture { desired: Box<DesiredPod>, before: Option<AppliedPod>, priority: Priority },
    /// Have it released, and say what became of it.
    Release { applied: AppliedPod, priority: Priority },
    /// Ask the kernel whether it is there.
    Check(AppliedPod),
    /// Let go of its namespace.
    StopFollowing,
    /// Answer the ADD that waits for it.
    Answer(PodResult),
    /// Answer the DELs that wait for it.
    AnswerReleased(PodResult),
    /// Count a failure.
    CountFailure(Cause),
    /// Log that it is ignored.
    LogIgnored(IgnoreReason),
    /// Log that its first process is awaited.
    LogStarting(PodFailure),
    /// Log that an attempt failed.
    LogFailed { failure: PodFailure, failures: u32, retry_in: Duration },
    /// Log that a claim cannot be followed.
    LogRefused(PodFailure),
    /// Publish an event on it.
    Publish(String),
    /// The ADD for it failed: the runtime takes the sandbox down and asks again with another.
    EndFailedAdd,
    /// Forget it, if no source has anything to say of it.
    ForgetIfUnclaimed,
}

impl MachineContext {
    pub(super) fn priority(&self) -> Priority {
        if self.add_waits || self.delete_waits { Priority::Urgent } else { Priority::Normal }
    }

    /// Whether a pod that has failed for so long may be without a process of its own yet: the kubelet makes the cgroup,
    /// then waits for volumes, then has the sandbox made. The API says `Running` when that is over; a sandbox that died
    /// takes a while to be replaced.
    pub(super) fn is_starting(&self, age: Duration) -> bool {
        !self.add_waits && self.stage.is_some_and(|stage| stage == Stage::Pending || age < RUNNING_PATIENCE)
    }
}
