//! The state machine of one pod: what is desired (intent) and what is applied (phase).
//!
//! [`PodMachine::on`] goes from an event to the next state and returns the commands to carry out. It is pure: the
//! time, random delays and waiting requests are in [`MachineContext`], and every action is a [`MachineCommand`].

mod event;

use std::{mem, time::Instant};

use super::{EVENT_AFTER, START_RETRY};
use crate::daemon::{
    capture::AppliedPod,
    cause::Cause,
    desired::DesiredPod,
    report::{PodFailure, PodState},
    sidecar::IgnoreReason,
    view::{ClaimError, Resolution},
    worker::Priority,
};

pub(super) use event::{
    Aftermath, AttemptStage, FailedAttempt, MachineCommand, MachineContext, MachineEvent,
};

/// What the sources ask for.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) enum Intent {
    /// No source asks for it.
    #[default]
    Absent,
    /// Its cgroup is not known yet, or it waits for the API.
    Awaiting,
    /// It is not to be captured.
    Ignored(IgnoreReason),
    /// It is to be captured.
    Desired(Box<DesiredPod>, SyncProgress),
}

/// Whether a desired pod is applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SyncProgress {
    /// Something else may be applied.
    Outdated,
    /// What is applied, if anything, is what is desired.
    UpToDate,
}

/// What is applied, and which job is in flight.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Phase {
    /// Nothing is applied.
    #[default]
    Unapplied,
    /// This is applied.
    Applied(AppliedPod),
    /// A capture is in flight.
    Capturing { before: Option<AppliedPod>, change: PodChange },
    /// A release is in flight.
    Releasing { applied: AppliedPod, change: PodChange },
    /// The kernel is asked whether the pod exists.
    Checking { applied: AppliedPod, change: PodChange },
}

/// What changed while a job was in flight, which then has to be repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PodChange {
    Clean,
    /// Its namespace changed. The reaction may be delayed.
    Namespace,
    Dirty,
}

/// When a pod that failed is retried.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Backoff {
    /// Attempts that failed in a row.
    pub(super) failures: u32,
    /// Time of the first of them.
    since: Option<Instant>,
    /// Earliest time of the next attempt.
    retry_at: Option<Instant>,
    /// Whether a release failed and none has succeeded since.
    release: ReleaseHealth,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum ReleaseHealth {
    #[default]
    Fine,
    Failed,
}

/// One pod.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct PodMachine {
    pub(super) intent: Intent,
    pub(super) phase: Phase,
    /// Why the last attempt failed.
    pub(super) failure: Option<PodFailure>,
    pub(super) backoff: Backoff,
    /// Changes of its namespace are not applied before this time.
    rest_until: Option<Instant>,
    /// Text of the event that was published last, until the pod is captured.
    published: Option<String>,
}

impl Phase {
    /// What is applied.
    pub(super) fn applied(&self) -> Option<&AppliedPod> {
        match self {
            Self::Unapplied => None,
            Self::Capturing { before, .. } => before.as_ref(),
            Self::Applied(applied) | Self::Releasing { applied, .. } | Self::Checking { applied, .. } => {
                Some(applied)
            }
        }
    }

    /// Whether the worker has a job for the pod.
    pub(super) fn is_in_flight(&self) -> bool {
        !matches!(self, Self::Unapplied | Self::Applied(_))
    }

    fn change(&mut self) -> Option<&mut PodChange> {
        match self {
            Self::Unapplied | Self::Applied(_) => None,
            Self::Capturing { change, .. }
            | Self::Releasing { change, .. }
            | Self::Checking { change, .. } => Some(change),
        }
    }

    /// The job is done without effect: what was applied before it still is. Returns what changed meanwhile.
    fn settle(&mut self) -> PodChange {
        let change = self.change().copied().unwrap_or(PodChange::Clean);
        *self = self.applied().cloned().map_or(Self::Unapplied, Self::Applied);
        change
    }

    fn adopt(&mut self, adopted: AppliedPod) {
        match self {
            Self::Capturing { before, .. } => *before = Some(adopted),
            Self::Releasing { applied, .. } | Self::Checking { applied, .. } => *applied = adopted,
            Self::Unapplied | Self::Applied(_) => *self = Self::Applied(adopted),
        }
    }
}

impl PodMachine {
    /// The state as metrics and `status` name it.
    pub(super) fn state(&self) -> PodState {
        match (&self.intent, self.phase.applied(), &self.failure) {
            (Intent::Ignored(_), ..) => PodState::Ignored,
            (_, _, Some(_)) => PodState::Failed,
            (Intent::Desired(_, SyncProgress::UpToDate), Some(_), None) => PodState::Captured,
            (Intent::Desired(..), ..) | (Intent::Awaiting, None, None) => PodState::Pending,
            (Intent::Awaiting | Intent::Absent, ..) => PodState::Releasing,
        }
    }

    /// Why it is ignored, if it is.
    pub(super) fn ignored(&self) -> Option<IgnoreReason> {
        match self.intent {
            Intent::Ignored(why) => Some(why),
            _ => None,
        }
    }

    /// Whether it is retried by `now`.
    pub(super) fn is_retry_due(&self, now: Instant) -> bool {
        self.backoff.retry_at.is_some_and(|retry_at| retry_at <= now)
    }

    /// Goes to the next state and returns the commands, in order.
    pub(super) fn on(&mut self, event: MachineEvent, context: &MachineContext) -> Vec<MachineCommand> {
        match event {
            MachineEvent::Resolved(resolution) => self.resolved(resolution, context),
            MachineEvent::SandboxEnded => {
                self.clear();
                Vec::new()
            }
            MachineEvent::Adopted(applied) => {
                self.phase.adopt(applied);
                Vec::new()
            }
            MachineEvent::Recheck => self.reconcile(context),
            MachineEvent::NamespaceChanged => self.namespace_changed(context),
            MachineEvent::Rest(rest) => {
                self.rest_until = Some(context.now + rest);
                Vec::new()
            }
            MachineEvent::RetryDue => {
                self.backoff.retry_at = None;
                self.reconcile(context)
            }
            MachineEvent::Unreachable => self.check(),
            MachineEvent::Gone(aftermath) => self.gone(aftermath, context),
            MachineEvent::Captured(applied) => self.captured(applied, context),
            MachineEvent::Detached => {
                if matches!(self.intent, Intent::Desired(..)) {
                    self.intent = Intent::Absent;
                }
                self.phase = Phase::Unapplied;
                self.reconcile(context)
            }
            MachineEvent::CaptureFailed(failed) => self.failed(failed, context),
            MachineEvent::ReleaseFailed(failed) => {
                self.backoff.release = ReleaseHealth::Failed;
                self.failed(failed, context)
            }
            MachineEvent::Released => self.released(context),
            MachineEvent::StillThere => match self.phase.settle() {
                PodChange::Clean => Vec::new(),
                PodChange::Namespace => self.namespace_changed(context),
                PodChange::Dirty => self.reconcile(context),
            },
        }
    }

    fn resolved(&mut self, resolution: Resolution, context: &MachineContext) -> Vec<MachineCommand> {
        match resolution {
            Resolution::Capture(desired) => return self.desire(desired, context),
            Resolution::CaptureIfKept(desired) if context.has_saved_rules || self.is_kept_beside_rules() => {
                return self.desire(desired, context);
            }
            Resolution::CaptureIfKept(_) => {
                return self.resolved(Resolution::Ignore(IgnoreReason::CapturesItself), context);
            }
            Resolution::Refuse(error) => return self.refuse(error, context),
            Resolution::AwaitApi => {
                // What is applied or ignored stays so until then.
                if self.intent == Intent::Absent {
                    self.intent = Intent::Awaiting;
                }
                return Vec::new();
            }
            Resolution::Ignore(why) => {
                let mut commands = Vec::new();
                if self.ignored() != Some(why) {
                    commands.push(MachineCommand::LogIgnored(why));
                }
                self.clear();
                self.intent = Intent::Ignored(why);
                commands.extend(self.reconcile(context));
                return commands;
            }
            Resolution::Unplaced => {
                self.clear();
                self.intent = Intent::Awaiting;
            }
            Resolution::Absent => {
                self.clear();
                self.intent = Intent::Absent;
            }
        }
        self.reconcile(context)
    }

    fn desire(&mut self, desired: Box<DesiredPod>, context: &MachineContext) -> Vec<MachineCommand> {
        let is_same = matches!(&self.intent, Intent::Desired(before, _) if *before == desired);
        if is_same && !context.add_waits && self.failure.is_none() {
            return Vec::new();
        }
        self.intent = Intent::Desired(desired, SyncProgress::Outdated);
        self.failure = None;
        self.backoff = Backoff { since: self.backoff.since, ..Backoff::default() };
        self.reconcile(context)
    }

    fn refuse(&mut self, error: ClaimError, context: &MachineContext) -> Vec<MachineCommand> {
        let cause = error.cause();
        let failure = PodFailure::from(error);
        let mut commands = vec![MachineCommand::Answer(Err(failure.clone()))];
        match (&self.intent, self.phase.applied()) {
            // What is applied stays.
            (Intent::Desired(..), Some(_)) => {}
            (_, Some(_)) => self.intent = Intent::Absent,
            // A capture that has not begun does not begin.
            (_, None) => {
                self.intent = Intent::Absent;
                self.backoff.retry_at = None;
            }
        }
        if self.failure.as_ref() != Some(&failure) {
            commands
                .extend([MachineCommand::CountFailure(cause), MachineCommand::LogRefused(failure.clone())]);
            self.backoff.failures = self.backoff.failures.saturating_add(1);
            self.failure = Some(failure);
        }
        commands.extend(self.publish());
        if !matches!(self.intent, Intent::Desired(..)) {
            // Continue with the release of an earlier sandbox's capture. The ADD has been answered.
            commands.extend(self.reconcile(&MachineContext { add_waits: false, ..*context }));
        }
        if context.add_waits {
            commands.push(MachineCommand::EndFailedAdd);
        }
        commands
    }

    /// No source asks for it.
    fn clear(&mut self) {
        if self.intent != Intent::Awaiting {
            self.intent = Intent::Absent;
        }
        self.failure = None;
        self.backoff.since = None;
        self.backoff.retry_at = None;
    }

    /// Apply a change of the namespace: at once, or when the pod has rested.
    fn namespace_changed(&mut self, context: &MachineContext) -> Vec<MachineCommand> {
        if let Some(change) = self.phase.change() {
            if *change == PodChange::Clean {
                *change = PodChange::Namespace;
            }
            return Vec::new();
        }
        match self.rest_until.filter(|until| *until > context.now) {
            Some(until) => {
                let retry_at = self.backoff.retry_at.map_or(until, |retry_at| retry_at.max(until));
                self.backoff.retry_at = Some(retry_at);
                Vec::new()
            }
            None => self.reconcile(context),
        }
    }

    /// Starts the job that leads from the phase to the intent, unless one is in flight or it is too early.
    fn reconcile(&mut self, context: &MachineContext) -> Vec<MachineCommand> {
        if let Some(change) = self.phase.change() {
            *change = PodChange::Dirty;
            return Vec::new();
        }
        if self.backoff.retry_at.is_some_and(|retry_at| retry_at > context.now) {
            return Vec::new();
        }
        let priority = context.priority();
        match (&self.intent, self.phase.applied().cloned()) {
            (Intent::Desired(desired, _), before) => {
                let desired = desired.clone();
                self.phase = Phase::Capturing { before: before.clone(), change: PodChange::Clean };
                vec![MachineCommand::Capture { desired, before, priority }]
            }
            (_, Some(applied)) => self.release(applied, priority),
            (intent, None) => {
                let mut commands = vec![MachineCommand::StopFollowing];
                if let Intent::Ignored(why) = intent {
                    commands.push(MachineCommand::Answer(Ok(why.as_str())));
                }
                commands.extend([
                    MachineCommand::AnswerReleased(Ok("released")),
                    MachineCommand::ForgetIfUnclaimed,
                ]);
                commands
            }
        }
    }

    fn release(&mut self, applied: AppliedPod, priority: Priority) -> Vec<MachineCommand> {
        self.phase = Phase::Releasing { applied: applied.clone(), change: PodChange::Clean };
        vec![MachineCommand::StopFollowing, MachineCommand::Release { applied, priority }]
    }

    /// Nothing leads to the namespace: stop following it, and ask the kernel whether it still exists.
    fn check(&mut self) -> Vec<MachineCommand> {
        let mut commands = vec![MachineCommand::StopFollowing];
        if let Some(applied) = self.phase.applied().cloned() {
            self.phase = Phase::Checking { applied: applied.clone(), change: PodChange::Clean };
            commands.push(MachineCommand::Check(applied));
        }
        commands
    }

    fn gone(&mut self, aftermath: Aftermath, context: &MachineContext) -> Vec<MachineCommand> {
        let change = self.phase.settle();
        let Some(applied) = self.phase.applied().cloned() else { return vec![MachineCommand::StopFollowing] };
        match aftermath {
            // No source will end its claim.
            Aftermath::Over => self.clear(),
            Aftermath::MayReturn => {
                self.backoff.failures = 1;
                self.backoff.retry_at = Some(context.now + (context.delay)(1));
            }
        }
        let commands = self.release(applied.clone(), Priority::Normal);
        self.phase = Phase::Releasing { applied, change };
        commands
    }

    fn captured(&mut self, applied: AppliedPod, context: &MachineContext) -> Vec<MachineCommand> {
        let change = self.phase.settle();
        self.phase = Phase::Applied(applied);
        if change == PodChange::Dirty {
            return self.reconcile(context);
        }
        if let Intent::Desired(_, progress) = &mut self.intent {
            *progress = SyncProgress::UpToDate;
        }
        self.failure = None;
        self.published = None;
        self.backoff = Backoff { release: self.backoff.release, ..Backoff::default() };
        let mut commands =
            vec![MachineCommand::Answer(Ok("captured")), MachineCommand::AnswerReleased(Ok("released"))];
        if change == PodChange::Namespace {
            commands.extend(self.namespace_changed(context));
        }
        commands
    }

    fn released(&mut self, context: &MachineContext) -> Vec<MachineCommand> {
        self.phase = Phase::Unapplied;
        let release = mem::take(&mut self.backoff.release);
        if release == ReleaseHealth::Failed || !matches!(self.intent, Intent::Desired(..)) {
            // Of an attempt to release it.
            self.failure = None;
            self.backoff.failures = 0;
            self.backoff.retry_at = None;
        }
        self.reconcile(context)
    }

    fn failed(
        &mut self,
        FailedAttempt { cause, failure, stage }: FailedAttempt,
        context: &MachineContext,
    ) -> Vec<MachineCommand> {
        let change = self.phase.settle();
        if change == PodChange::Dirty {
            let mut commands = vec![MachineCommand::CountFailure(cause)];
            commands.extend(self.reconcile(context));
            return commands;
        }
        self.backoff.failures = self.backoff.failures.saturating_add(1);
        let retry_in = (context.delay)(self.backoff.failures);
        let since = *self.backoff.since.get_or_insert(context.now);
        let age = context.now.saturating_duration_since(since);
        let is_starting = stage == AttemptStage::MayBeStarting && context.is_starting(age);
        let wait = if is_starting { retry_in.min(START_RETRY) } else { retry_in };
        self.backoff.retry_at = Some(context.now + wait);
        let mut commands = Vec::new();
        if change == PodChange::Namespace {
            commands = self.namespace_changed(context);
        }
        if is_starting {
            commands.push(MachineCommand::LogStarting(failure));
            return commands;
        }
        commands.push(MachineCommand::CountFailure(cause));
        // A repeated failure is logged once.
        if self.failure.as_ref() != Some(&failure) {
            let failures = self.backoff.failures;
            commands.push(MachineCommand::LogFailed { failure: failure.clone(), failures, retry_in });
        }
        // Nothing depends on shadow mode, least of all the start of a pod.
        let fails_add = context.add_waits && !self.is_optional();
        let answer = if self.is_optional() { Ok("not_shadowed") } else { Err(failure.clone()) };
        commands
            .extend([MachineCommand::AnswerReleased(Err(failure.clone())), MachineCommand::Answer(answer)]);
        self.failure = Some(failure);
        if context.add_waits || cause == Cause::Options || age >= EVENT_AFTER {
            commands.extend(self.publish());
        }
        if fails_add {
            commands.push(MachineCommand::EndFailedAdd);
        }
        commands
    }

    /// Whether what is applied leaves the capture to rules of the pod's own, or may have replaced them.
    fn is_kept_beside_rules(&self) -> bool {
        self.phase.applied().is_some() && self.is_optional()
    }

    fn is_optional(&self) -> bool {
        matches!(&self.intent, Intent::Desired(desired, _) if desired.is_optional())
    }

    /// Publishes an event, once for a series of equal failures.
    fn publish(&mut self) -> Option<MachineCommand> {
        let text = &self.failure.as_ref()?.text;
        if self.published.as_ref() == Some(text) {
            return None;
        }
        self.published = Some(text.clone());
        Some(MachineCommand::Publish(text.clone()))
    }
}

#[cfg(test)]
mod tests;
